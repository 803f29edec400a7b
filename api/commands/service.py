"""The service as child processes: embedded Postgres, the API and a worker, started and stopped together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from api.commands.console import Refused, err
from db.engine import URL_VARIABLE, connect, migrate

READY_SECONDS = 60.0
# A worker gives its search back before it leaves.
STOP_SECONDS = 20.0
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1


@dataclass
class Service:
    """The API and a worker as children of this process, on one database. What they print goes to `log`, or here."""

    engine: Engine
    commands: dict[str, list[str]]
    log: Path | None = None
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start the child `name`. It dies with this process, however that ends."""
        environment = os.environ | {URL_VARIABLE: self.engine.url.render_as_string(hide_password=False)}
        with self.log.open("ab") if self.log else contextlib.nullcontext() as output:
            # A session of its own: Ctrl-C reaches us alone, and we stop the children in order.
            self.children[name] = subprocess.Popen(
                self.commands[name],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )

    def check(self) -> None:
        """Start again what was killed, the embedded database included. Raises Refused when a child gave up itself."""
        for name, child in list(self.children.items()):
            code = child.poll()
            if code is not None and code < 0:
                err.print(f"The {name} was killed by signal {-code}; starting it again.")
                self.start(name)
            elif code is not None:
                where = f"in {self.log}" if self.log else "above"
                detail = f"the {name} ended with code {code}; its own message is {where}"
                raise Refused({"title": "The service stopped", "detail": detail})
        with contextlib.suppress(OperationalError), self.engine.connect():
            pass

    def stop(self) -> None:
        """End the children, the last started first: politely, then firmly."""
        children = list(reversed(self.children.values()))
        for child in children:
            child.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextmanager
def running_service(host: str, port: int, log: Path | None = None) -> Iterator[Service]:
    """The API at `host`:`port` and a worker, answering; both are stopped at the end.

    Raises Refused when the port is taken or a child gives up, DatabaseUnavailable when there is no database.
    """
    _check_free(host, port)
    engine = connect()
    migrate(engine)
    service = Service(engine, {"API": api_command(host, port, "warning"), "worker": worker_command()}, log)
    try:
        for name in service.commands:
            service.start(name)
        _await_ready(address(host, port), service)
        yield service
    finally:
        service.stop()
        engine.dispose()


def address(host: str, port: int) -> str:
    """The URL of a service that listens on `host`:`port`."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def api_command(host: str, port: int, log_level: str = "info") -> list[str]:
    """The arguments that start the API."""
    options = ["--host", host, "--port", str(port), "--log-level", log_level, "--timeout-graceful-shutdown", "2"]
    return [sys.executable, "-m", "uvicorn", "--factory", "api.app:create_app", *options]


def worker_command() -> list[str]:
    """The arguments that start a worker."""
    return [sys.executable, "-m", "workers", "run"]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def interrupting_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        detail = f"{host}:{port} cannot be listened on ({error.strerror}); name another port with --port"
        raise Refused({"title": "The port is taken", "detail": detail}) from error


def _await_ready(url: str, service: Service) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        service.check()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=2.0, trust_env=False).is_success:
                return
        time.sleep(POLL_SECONDS)
    raise Refused({"title": "The service did not start", "detail": f"{url} was not ready in {READY_SECONDS:g} s"})


def _die_with_parent() -> Callable[[], None] | None:
    """A hook for the child that ends it when this process dies, even by SIGKILL (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def hook() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return hook
