"""A Postgres server of this machine's own installation, reached over TCP with a password, as a deployment's is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.aside import PATIENCE

ROLES = Path(__file__).parents[2] / "docker" / "roles.sql"


def programs() -> Path:
    """The folder of Debian's newest server, or of the one on the path; without one the test is skipped."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    here = shutil.which("initdb")
    if not found and here is None:
        pytest.skip("NO POSTGRES SERVER IS INSTALLED (Debian: apt-get install postgresql): the topology is not tested")
    return (found[-1] if found else Path(str(here))).parent


@contextmanager
def server(port: int, password: str) -> Iterator[str]:
    """A server on `port` of the loopback interface, set up by docker/roles.sql; its URL, without the password."""
    tools, folder = programs(), Path(tempfile.mkdtemp(prefix="bitfrontier-postgres-"))
    # Postgres refuses to run as root.
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, "postgres", "postgres")
    data = folder / "data"
    initialise = [tools / "initdb", "--pgdata", data, "--username", "postgres", "--no-sync"]
    authenticate = ["--auth-local", "trust", "--auth-host", "scram-sha-256"]
    subprocess.run([*initialise, *authenticate], cwd=folder, check=True, capture_output=True, **user)
    settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": folder, "fsync": "off"}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([tools / "postgres", "-D", data, *options], cwd=folder, stderr=log, **user)
    try:
        _await(tools, folder, port)
        # What the image of Postgres does with the files that it finds at its first start.
        setup = ["psql", "--host", folder, "--port", str(port), "--username", "postgres", "--file", ROLES]
        environment = os.environ | {"POSTGRES_PASSWORD": password}
        command = [tools / setup[0], *setup[1:], "--no-psqlrc", "--set", "ON_ERROR_STOP=1"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        yield f"postgresql://bitfrontier@127.0.0.1:{port}/bitfrontier"
    finally:
        # Fast: whoever is still connected is let go.
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
        shutil.rmtree(folder)


def _await(tools: Path, folder: Path, port: int) -> None:
    ready = [tools / "pg_isready", "--quiet", "--host", folder, "--port", str(port)]
    until = time.monotonic() + PATIENCE
    while subprocess.run(ready, check=False).returncode:
        assert time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.05)
