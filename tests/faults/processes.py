"""Worker processes that tests kill: forked from one that has imported everything, so that they start at once."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tests.aside import PATIENCE

PRELOADED = [
    "pytest",
    "optuna.storages",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
    "workers.__main__",
    "tests.faults.processes",
]
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl

FORKING = multiprocessing.get_context("forkserver")


def prepare(environment: Mapping[str, str]) -> None:
    """Start the process that others are forked from, with `environment` in place while it imports."""
    kept = dict(os.environ)
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    FORKING.set_forkserver_preload(PRELOADED)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)


class Forked:
    """A forked process that runs `function`, with what it prints in `log`."""

    def __init__(self, function: Callable[[], Any], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._process = FORKING.Process(target=_run, args=(function, dict(environment), str(log)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        self._process.join(PATIENCE)

    def stop(self) -> int | None:
        """SIGTERM, and wait until it is gone; its exit status, or None when it had to be killed."""
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGTERM)
        return self.join()

    def join(self, seconds: float = PATIENCE) -> int | None:
        """Wait until it has ended by itself; its exit status, or None when it had to be killed."""
        self._process.join(seconds)
        if self.alive:
            self.kill()
            return None
        return self._process.exitcode


def work() -> None:
    """`python -m workers run`."""
    from workers.__main__ import main

    sys.argv = ["workers", "run"]
    sys.exit(main())


def serve(port: int) -> None:
    """`bitfrontier api`, on this port of the loopback address."""
    from api.commands.service import api_command

    sys.argv = api_command("127.0.0.1", port)[2:]
    runpy.run_module("uvicorn", run_name="__main__", alter_sys=True)


def _run(function: Callable[[], Any], environment: dict[str, str], log: str) -> None:
    ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    function()
