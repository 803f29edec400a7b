"""How the tests are run: the long ones first, none for ever, and one that took its process down is not begun again."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

UNWIND_SECONDS = 120.0
"""How much longer than the time limit of a test its setup, call or teardown may take, until its process is ended."""

# By itself hypothesis fails what takes longer than 200 ms, and what it takes long to make examples of. The examples are
# the same every time, so that a failure is one of the change at hand; `--hypothesis-profile exploring` looks for more.
patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("exploring", patient)
hypothesis.settings.register_profile("patient", patient, derandomize=True)
hypothesis.settings.load_profile("patient")

# Ray gives an evaluator all cores. Threads that spin while they wait for one another on busy cores make small work a
# hundred times slower; those that sleep do not. Read by every process that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Ray ends evaluators while 95 % of the machine's memory is in use, by whomever.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the true stderr, where the stacks of a process that is ended can still be written."""
    with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():  # type: ignore[union-attr]
        config.stash[_stderr] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _bounded(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _bounded(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    return (yield from _bounded(item))


def _bounded(item: pytest.Item) -> Iterator[None]:
    """End the process, with the stacks of all threads, where the time limit of the test could not end it.

    The limit raises in the main thread: what then waits for ever to be left stays. And there is none any more in the
    teardown of a test that failed.
    """
    limit = float(item.config.getini("timeout") or 0)
    if limit:
        faulthandler.dump_traceback_later(limit + UNWIND_SECONDS, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)  # type: ignore[misc]
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_report_teststatus(report: pytest.TestReport) -> Iterator[None]:
    """Name what fails when it fails: a run that is cut off has no summary."""
    category, letter, word = yield  # type: ignore[misc]
    return category, f"\n{letter} {report.nodeid}\n" if report.failed else letter, word  # type: ignore[return-value]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files: at the end there is then work for every process."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    config.option.loadscopereorder = False
    return _Files(config, log)


class _Files(LoadFileScheduling):
    """Whole files to each process, in the order in which they were collected."""

    def remove_node(self, node: Any) -> str | None:
        # Else another process begins with the test that took the first one down, and so on.
        units: Sequence[dict[str, bool]] = list(self.assigned_work[node].values())
        ended = next(((unit, test) for unit in units for test, done in unit.items() if not done), None)
        if ended is None:
            return super().remove_node(node)
        unit, test = ended
        unit[test] = True
        super().remove_node(node)
        return test
