"""What a worker may be told, and that it does not touch the queue where it was told something wrong."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from workers import settings

SECONDS = "a number of seconds, more than 0"
WHOLE = "a whole number, at least 1"
NO_SECONDS = ["0", "-1", "nan", "inf", "1e300", "long"]
NOT_WHOLE = ["0", "-1", "two", "1.5"]

WRONG: list[tuple[str, Callable[[], object], list[str], str]] = [
    ("BITFRONTIER_LEASE_SECONDS", settings.lease, NO_SECONDS, SECONDS),
    ("BITFRONTIER_GRACE_SECONDS", settings.grace, NO_SECONDS, SECONDS),
    ("BITFRONTIER_IDLE_SECONDS", settings.idle, NO_SECONDS, SECONDS),
    ("BITFRONTIER_PATIENCE_SECONDS", settings.patience, NO_SECONDS, SECONDS),
    ("BITFRONTIER_TASK_SECONDS", settings.task_seconds, NO_SECONDS, SECONDS),
    ("BITFRONTIER_EVALUATORS", settings.evaluators_per_node, NOT_WHOLE, WHOLE),
    ("BITFRONTIER_POOL_SIZE", settings.pool_size, NOT_WHOLE, WHOLE),
    ("BITFRONTIER_GPUS_PER_EVALUATOR", settings.gpus_per_evaluator, ["0", "-1", "1.5", "nan", "inf", "all"], "'auto'"),
    ("BITFRONTIER_DTYPE", settings.dtype, ["float16", "Float32"], "float32, bfloat16"),
    ("BITFRONTIER_POOL", settings.pool_kind, ["dask"], "ray, inprocess"),
]


@pytest.mark.parametrize(("variable", "read", "wrong", "accepted"), WRONG)
def test_a_setting_that_makes_no_sense_is_refused_before_a_search_is_claimed(
    variable: str, read: Callable[[], object], wrong: list[str], accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in wrong:
        monkeypatch.setenv(variable, text)
        for check in (read, settings.check_settings):
            with pytest.raises(settings.WrongSetting, match=f"{variable} is '{text}'; accepted: {accepted}"):
                check()


@pytest.mark.parametrize(("variable", "read"), [one[:2] for one in WRONG])
def test_an_empty_variable_is_one_left_out(
    variable: str, read: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    default = read()
    monkeypatch.setenv(variable, "")
    assert read() == default


@pytest.mark.parametrize("address", ["", "10.0.0.1:6379"])
def test_a_backend_that_there_is_not_is_refused_wherever_evaluators_run(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("BITFRONTIER_KERNELS", "none")
    with pytest.raises(settings.BitfrontierError, match="BITFRONTIER_KERNELS cannot be none; accepted"):
        settings.check_settings()


def test_a_worker_that_was_told_something_wrong_says_so_and_claims_nothing() -> None:
    """Nor does it ask for the database: there is none here."""
    environment = os.environ | {
        "BITFRONTIER_DTYPE": "float16",
        "BITFRONTIER_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    }
    ended = subprocess.run(
        [sys.executable, "-m", "workers", "run"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (ended.returncode, ended.stdout) == (4, "")
    assert ended.stderr == "BITFRONTIER_DTYPE is 'float16'; accepted: float32, bfloat16\n"
