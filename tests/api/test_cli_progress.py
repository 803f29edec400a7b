"""What is shown while a search goes on: how far each stage is, how fast it goes, and how long it still takes."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console
from sqlalchemy import create_engine

from api.client import Event
from api.commands import progress
from api.commands.progress import Bars, Lines, show, shown_on
from api.commands.service import Service
from api.events import read_event
from tests.aside import PATIENCE, wait_until

BEGAN = datetime(2026, 11, 22, tzinfo=UTC)


def event(after: float, kind: str, **data: Any) -> Event:
    """An event so many seconds after the beginning."""
    told = data | {"at": (BEGAN + timedelta(seconds=after)).isoformat()}
    return read_event({"id": "1", "event": kind, "data": json.dumps(told)})


TABLE = {"stage": "sensitivity", "total": 0, "attempt": 1, "forward_passes": 20, "estimated_seconds": 41}
EVENTS = [
    event(0, "state", state="running"),
    event(0, "stage", stage="profile", total=1),
    event(2, "progress", stage="profile", done=1, total=1),
    event(2, "stage_end", stage="profile", seconds=2.0, reused={}),
    event(2, "stage", **TABLE, metric="kl"),
    event(2, "progress", stage="sensitivity", done=0, total=0),
    event(2, "stage_end", stage="sensitivity", seconds=0.1, reused={"sensitivity": 1}),
    event(2, "stage", **TABLE, metric="pqi"),
    event(42, "progress", stage="sensitivity", done=10, total=40),
    event(162, "progress", stage="sensitivity", done=40, total=40),
    event(162, "notice", message="pqi: a note"),
    event(162, "stage_end", stage="sensitivity", seconds=160.0, reused={}),
    event(162, "stage", stage="refine", total=64),
    event(172, "progress", stage="refine", done=50, total=64),
    event(173, "stage_end", stage="refine", seconds=11.0, reused={}),
    event(174, "stage", stage="accept", total=4),
    event(175, "progress", stage="accept", done=4, total=4),
    event(176, "state", state="succeeded"),
]


def lines_of(events: list[Event]) -> list[str]:
    console = Console(file=io.StringIO(), width=100, record=True)
    show(events, Lines(console))
    return console.export_text().splitlines()


def test_a_line_when_a_stage_has_ended() -> None:
    assert lines_of(EVENTS) == [
        "profile: 1 of 1, in 2 s",
        "kl, about 41 s: reused",
        "pqi: a note",
        "pqi, about 41 s: 40 of 40, in 3 min",
        "refine: 50 of 64, in 11 s",
        "accept: 4 of 4",
    ]


def test_and_now_and_then_with_the_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    told = lines_of(EVENTS)
    assert "pqi, about 41 s: 10 of 40, 4 s each, 2 min left" in told
    assert "refine: 50 of 64, 5.0/s, 3 s left" in told
    assert not [line for line in told if "?" in line]


def test_a_failed_search_is_not_shown_as_done() -> None:
    failed = [*EVENTS[:2], event(3, "state", state="failed")]
    assert lines_of(failed) == []


def test_a_new_attempt_counts_from_the_start() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    bars = Bars(console)
    show([*EVENTS, *EVENTS[:5]], bars)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "50 of 64" in shown
    assert [task.description for task in bars._bars.tasks] == ["profile", "kl, about 41 s"]


def test_a_terminal_has_bars_and_with_json_nobody_else_has_anything() -> None:
    terminal, file = Console(file=io.StringIO(), force_terminal=True), Console(file=io.StringIO())
    assert isinstance(shown_on(terminal, quiet=True), Bars)
    assert type(shown_on(file, quiet=False)) is Lines
    show(EVENTS, shown_on(file, quiet=True))
    assert file.file.getvalue() == ""  # type: ignore[attr-defined]


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(300)"


def test_a_second_ctrl_c_waits_for_no_process(tmp_path: Any) -> None:
    log = tmp_path / "log"
    engine = create_engine("postgresql+psycopg://127.0.0.1/none")
    service = Service(engine, {"worker": [sys.executable, "-S", "-c", DEAF]}, "open", 2 * PATIENCE, log)
    service.start("worker")
    wait_until(lambda: "ready" in log.read_text(), "it ignores SIGTERM")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            service.stop()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert service.children["worker"].returncode == -signal.SIGKILL
