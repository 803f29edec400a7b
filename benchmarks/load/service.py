"""The processes under load: a Postgres, an API, a worker on demand, and what they use."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from sqlalchemy import Engine

from api.commands.service import address, api_command, free_port, worker_command
from db import embedded
from db.engine import connect, migrate
from db.keys import create_key

HOST = "127.0.0.1"
RATE = 1_000_000
"""Requests a minute that a key may make: more than it can."""


@dataclass
class Service:
    """One API process on one Postgres, and as many API keys as were asked for."""

    url: str
    keys: list[str]
    engine: Engine
    api: psutil.Process
    postgres: psutil.Process
    environment: dict[str, str]

    def memory(self) -> float:
        """Resident memory of the API, MB."""
        return self.api.memory_info().rss / 1e6

    def cpu_seconds(self) -> dict[str, float]:
        """What the API and all of Postgres's processes have used so far."""
        with self.engine.connect():
            of_postgres = [self.postgres, *self.postgres.children()]
            return {"API": _used([self.api]), "Postgres": _used(of_postgres) + _reaped(self.postgres)}

    @contextmanager
    def worker(self) -> Iterator[None]:
        """A worker, until the end of the block."""
        worker = subprocess.Popen(worker_command(), env=self.environment)
        try:
            yield
        finally:
            worker.terminate()
            worker.wait(60)


@contextmanager
def service(models: Path, keys: int = 1) -> Iterator[Service]:
    """A service of its own, which asks for one of so many keys; registered models lie below `models`."""
    with tempfile.TemporaryDirectory(prefix="bitfrontier-load-", ignore_cleanup_errors=True) as name:
        folder, port = Path(name), free_port()
        # As root, Postgres runs as another user, who must be able to enter.
        folder.chmod(0o755)
        url = embedded.start(folder / "postgres").render_as_string(hide_password=False)
        engine = connect(url)
        migrate(engine)
        tokens = [create_key(engine, f"client-{number}", {"write"}, rate_per_minute=RATE)[1] for number in range(keys)]
        environment = os.environ | {
            "BITFRONTIER_DATABASE_URL": url,
            "BITFRONTIER_DATA": name,
            "BITFRONTIER_MODELS": str(models),
            "BITFRONTIER_AUTH": "keys",
            "BITFRONTIER_LOG": "warning",
        }
        with (folder / "api.log").open("wb") as log:
            api = subprocess.Popen(api_command(HOST, port), env=environment, stdout=log, stderr=log)
        try:
            _await(address(HOST, port))
            postgres = psutil.Process(int((folder / "postgres" / "postmaster.pid").read_text().split()[0]))
            yield Service(address(HOST, port), tokens, engine, psutil.Process(api.pid), postgres, environment)
        finally:
            api.terminate()
            api.wait(30)
            engine.dispose()
            embedded.leave(folder / "postgres")


def _await(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=2, trust_env=False).is_success:
                return
        time.sleep(0.1)
    sys.exit(f"{url} does not get ready")


def _used(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


def _reaped(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.children_user + times.children_system)
