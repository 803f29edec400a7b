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
from typing import TYPE_CHECKING

import httpx

from api.commands.console import err, out
from api.commands.database import database
from db.logs import LEVEL_VARIABLE
from search.errors import BitfrontierError

if TYPE_CHECKING:
    from sqlalchemy import Engine

AUTH_VARIABLE = "BITFRONTIER_AUTH"
PROXIES_VARIABLE = "FORWARDED_ALLOW_IPS"
GRACE_VARIABLE = "BITFRONTIER_GRACE_SECONDS"
READY_SECONDS = 60.0
GRACE_SECONDS = 20.0
LEAVE_SECONDS = 10.0
"""Once its grace period is over, a worker still gives its search back and lets its evaluators go."""
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1


class BadSetting(BitfrontierError):
    """A variable of the environment has a value that is not accepted."""

    status = 422
    type = "bad-setting"
    title = "A setting is not accepted"


class PortTaken(BitfrontierError):
    """Something listens on the port already."""

    status = 409
    type = "port-taken"
    title = "The port is taken"


class ServiceStopped(BitfrontierError):
    """The service did not start, or has ended by itself."""

    status = 503
    type = "service-stopped"
    title = "The service does not run"


@dataclass
class Service:
    """The API and a worker as children of this process, on one database. What they print goes to `log`, or here."""

    engine: Engine
    commands: dict[str, list[str]]
    access: str
    patience: float = GRACE_SECONDS + LEAVE_SECONDS
    """Seconds that the children have to leave."""
    log: Path | None = None
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start the child `name`. It dies with this process, however that ends."""
        from db.engine import URL_VARIABLE

        url = self.engine.url.render_as_string(hide_password=False)
        environment = os.environ | {URL_VARIABLE: url, AUTH_VARIABLE: self.access}
        if name == "API":
            # A line for each request is too much beside what the worker says.
            environment.setdefault(LEVEL_VARIABLE, "warning")
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
        """Start again what was killed, the embedded database included. Raises ServiceStopped when a child gave up."""
        from sqlalchemy.exc import OperationalError

        for name, child in list(self.children.items()):
            code = child.poll()
            if code is not None and code < 0:
                err.print(f"The {name} was killed by signal {-code}; starting it again.")
                self.start(name)
            elif code is not None:
                where = f"in {self.log}" if self.log else "above"
                raise ServiceStopped(f"the {name} ended with code {code}; its own message is {where}")
        with contextlib.suppress(OperationalError), self.engine.connect():
            pass

    def stop(self) -> None:
        """End the children, the last started first: politely, then firmly; firmly at once where Ctrl-C comes again."""
        children = list(reversed(self.children.values()))
        for child in children:
            child.terminate()
        deadline = time.monotonic() + self.patience
        try:
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for child in children:
                child.kill()
                child.wait()


@contextmanager
def running_service(host: str, port: int, log: Path | None = None) -> Iterator[Service]:
    """The API at `host`:`port` and a worker, answering; both are stopped at the end.

    Raises PortTaken, BadSetting, ServiceStopped when a child gives up, DatabaseUnavailable when there is no database.
    """
    patience = grace() + LEAVE_SECONDS
    _check_free(host, port)
    commands = {"API": api_command(host, port), "worker": worker_command()}
    with database() as engine:
        service = Service(engine, commands, access(host), patience, log)
        try:
            for name in service.commands:
                service.start(name)
            _await_ready(address(host, port), service)
            yield service
        finally:
            service.stop()


def access(host: str) -> str:
    """Whether the API asks for keys where it listens on `host`: as `BITFRONTIER_AUTH` says, else not on loopback.

    Raises BadSetting when the variable holds anything else than `keys` or `open`.
    """
    given = os.environ.get(AUTH_VARIABLE)
    if given and given not in ("keys", "open"):
        raise BadSetting(f"{AUTH_VARIABLE} is '{given}'; accepted: keys, open", field=AUTH_VARIABLE, value=given)
    return given or ("open" if _is_loopback(host) else "keys")


def grace() -> float:
    """How long a worker that is asked to stop may go on, in seconds. Raises BadSetting as the worker would."""
    given = os.environ.get(GRACE_VARIABLE) or str(GRACE_SECONDS)
    with contextlib.suppress(ValueError):
        if 0 < float(given) < float("inf"):
            return float(given)
    detail = f"{GRACE_VARIABLE} is '{given}'; accepted: a number of seconds, more than 0"
    raise BadSetting(detail, field=GRACE_VARIABLE, value=given)


def say_access(host: str) -> None:
    """Print who may use a service that listens on `host`, where it asks nobody for a key."""
    if access(host) != "open":
        return
    if _is_loopback(host):
        out.print("Open to everyone on this machine: no key is asked for on loopback.")
    else:
        out.print(f"Open to everyone who reaches it: {AUTH_VARIABLE} is open, and no key is asked for.")


def address(host: str, port: int) -> str:
    """The URL of a service that listens on `host`:`port`."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def api_command(host: str, port: int) -> list[str]:
    """The arguments that start the API."""
    options = ["--host", host, "--port", str(port), "--timeout-graceful-shutdown", "2", "--no-server-header"]
    options += ["--http", "api.connection:Connection", "--ws", "none"]
    if not os.environ.get(PROXIES_VARIABLE):
        # Left to itself, uvicorn believes whatever address a client on this machine makes up.
        options.append("--no-proxy-headers")
    return [sys.executable, "-m", "uvicorn", "--factory", "api.app:service", *options]


def worker_command() -> list[str]:
    """The arguments that start a worker."""
    return [sys.executable, "-m", "workers", "run"]


def log_file() -> Path:
    """Where the processes of a local search say what they do; they would garble the progress bars."""
    from db.engine import data_directory

    folder = data_directory()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "local-search.log"


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


def _is_loopback(host: str) -> bool:
    # Not above: --help and completion need not wait for the server's libraries.
    from api.origins import is_loopback

    return is_loopback(host)


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        detail = f"{host}:{port} cannot be listened on ({error.strerror}); name another port with --port"
        raise PortTaken(detail, field="port", value=port) from error


def _await_ready(url: str, service: Service) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        service.check()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=2.0, trust_env=False).is_success:
                return
        time.sleep(POLL_SECONDS)
    raise ServiceStopped(f"{url} was not ready in {READY_SECONDS:g} s")


def _die_with_parent() -> Callable[[], None] | None:
    """A hook for the child that ends it when this process dies, even by SIGKILL (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def hook() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return hook
