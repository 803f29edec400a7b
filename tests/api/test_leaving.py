"""How long the children of `up` have to leave: no less than the worker's own grace period."""

import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from api.commands.service import GRACE_SECONDS, GRACE_VARIABLE, LEAVE_SECONDS, BadSetting, Service, grace
from tests.aside import PATIENCE, wait_until
from workers import settings

SLOW = """
import signal, sys, time
def leave(*_):
    time.sleep(float(sys.argv[1]))
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("leaves_in", "patience", "code"), [(0.2, PATIENCE, 0), (PATIENCE, 0.1, -9)])
def test_a_child_is_killed_only_when_its_time_to_leave_is_over(
    leaves_in: float, patience: float, code: int, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    engine = create_engine("postgresql+psycopg://127.0.0.1/none")
    service = Service(engine, {"worker": [sys.executable, "-S", "-c", SLOW, str(leaves_in)]}, "open", patience, log)
    service.start("worker")
    wait_until(lambda: "ready" in log.read_text())
    service.stop()
    assert service.children["worker"].returncode == code


@pytest.mark.parametrize("given", ["", "45"])
def test_the_time_is_the_workers_own_and_some_more(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRACE_VARIABLE, given)
    assert grace() == settings.grace() == (float(given) if given else GRACE_SECONDS)
    assert LEAVE_SECONDS >= 10


def test_a_time_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRACE_VARIABLE, "long")
    with pytest.raises(BadSetting, match="BITFRONTIER_GRACE_SECONDS is 'long'"):
        grace()
