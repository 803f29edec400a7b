"""The command line as tests type it: in this process, and as a process on a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine
from typer.testing import CliRunner

from api.cli import app
from db.queue import Claim, claim
from db.searches import get_search
from search.request import SearchRequest
from tests.api import examples
from tests.aside import PATIENCE, aside


def run(*arguments: str, url: str, **environment: str) -> Any:
    """What the command line does with `arguments`, nobody looking at a terminal."""
    environment = {"BITFRONTIER_URL": url, "BITFRONTIER_KEY": "", "COLUMNS": "160"} | environment
    return CliRunner().invoke(app, list(arguments), env=environment)


@contextmanager
def a_worker(engine: Engine, work: Callable[[Engine, Claim], None]) -> Iterator[None]:
    """Somebody who does `work` with the next search that is queued."""

    def take() -> None:
        deadline = time.monotonic() + PATIENCE
        while (held := claim(engine, "test-worker", examples.LEASE)) is None:
            assert time.monotonic() < deadline, "nobody asked for a search"
            time.sleep(0.05)
        work(engine, held)

    taking = aside(take)
    yield
    taking.result(PATIENCE)


def finish(engine: Engine, held: Claim) -> None:
    """Do a search as a worker does, without computing."""
    examples.report(engine, held, SearchRequest.model_validate(get_search(engine, held.search_id).request))


class Terminal:
    """`bitfrontier` as a process on a terminal of its own, 80 columns wide."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", *arguments],
            env=os.environ | {"COLUMNS": "80", "TERM": "xterm"} | environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # Whoever runs the tests in the background hands down an ignored SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(theirs)

    def wait_for(self, words: str) -> None:
        """Read on until `words` are shown."""
        self._read_until(lambda: words in self.shown, f"'{words}' is shown")

    def ctrl_c(self) -> None:
        """Send what the key sends."""
        self.process.send_signal(signal.SIGINT)

    def leave(self) -> int:
        """Read what is still shown; the exit code."""
        self._read_until(lambda: False, "it ends")
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self._ours)

    def _read_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"still waiting until {what}: {self.shown}"
            if select.select([self._ours], [], [], 0.2)[0]:
                try:
                    read = os.read(self._ours, 65536)
                except OSError:  # what Linux says once nobody has the other end
                    return
                self.shown += read.decode(errors="replace")


@contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    """A process on a terminal, which ends with the block at the latest."""
    opened = Terminal(*arguments, **environment)
    try:
        yield opened
    finally:
        opened.close()
