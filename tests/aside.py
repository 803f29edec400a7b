"""Calls that tests make in other threads, and how long they wait for anything.

No thread of these is waited for but by name: what never returns does not keep a test that failed from ending.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Value = TypeVar("Value")

PATIENCE = 240.0
"""Seconds after which what did not happen is taken never to happen: many times what a slow and busy machine takes."""


def aside(function: Callable[..., Value], *arguments: Any) -> Future[Value]:
    """Begin a call in a thread of its own. Ask for `result(PATIENCE)`: what it raised is raised there."""
    call: Future[Value] = Future()

    def run() -> None:
        try:
            call.set_result(function(*arguments))
        except BaseException as error:
            call.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return call


def results(calls: list[Future[Value]]) -> list[Value]:
    """What each call returned. Raises TimeoutError when one takes longer than `PATIENCE`."""
    until = time.monotonic() + PATIENCE
    return [call.result(max(0.0, until - time.monotonic())) for call in calls]


def wait_until(condition: Callable[[], object], what: str = "it happens", pause: float = 0.02) -> None:
    """Wait until the condition holds. Raises AssertionError when it does not within `PATIENCE`."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"after {PATIENCE:g} s still waiting until {what}"
        time.sleep(pause)
