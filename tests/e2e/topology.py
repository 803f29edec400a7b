"""The processes of docker-compose.yml without their containers: reached over TCP, with secrets in files."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from sqlalchemy import Engine

from api.commands.service import free_port
from db.engine import connect
from tests.aside import PATIENCE, wait_until
from tests.e2e import postgres

DOCKER = Path(__file__).parents[2] / "docker"
MARK = "BITFRONTIER_TEST_TOPOLOGY"
RAY_STORE = "100000000"


@dataclass
class Topology:
    """Two APIs and two workers on one database and one Ray cluster."""

    environment: dict[str, str]
    folder: Path
    engine: Engine
    apis: list[str] = field(default_factory=list)
    workers: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    key: str = ""

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command to its end, with the secrets that its container would have."""
        return subprocess.run(
            [DOCKER / "with-secrets", *command],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """A command that goes on; what it says is in the file `name`."""
        with (self.folder / name).open("wb") as log:
            return subprocess.Popen(
                [DOCKER / "with-secrets", *command], env=self.environment | environment, stdout=log, stderr=log
            )

    def client(self, api: int, key: str | None = None) -> httpx.Client:
        """A client of one of the APIs, with the topology's key unless told otherwise."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        return httpx.Client(base_url=self.apis[api], headers=headers, timeout=PATIENCE, trust_env=False)

    def log(self, name: str) -> str:
        """What a process has said."""
        return (self.folder / name).read_text()


@contextmanager
def topology(models: Path) -> Iterator[Topology]:
    """Everything started and ready; every process is ended afterwards, those that Ray started included."""
    password, mark = secrets.token_hex(16), secrets.token_hex(16)
    # Ray's sockets have long names; pytest's folders would make them longer than a socket's name may be.
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bft-", dir="/tmp", ignore_cleanup_errors=True))
        )
        url = stack.enter_context(postgres.server(free_port(), password))
        engine = connect(url.replace("@", f":{password}@"))
        stack.callback(engine.dispose)
        stack.callback(_end_all, mark)
        found = Topology(_environment(folder, url, password, models) | {MARK: mark}, folder, engine)
        head = free_port()
        found.environment["RAY_ADDRESS"] = f"127.0.0.1:{head}"
        ray = found.start(
            "ray-head", "env", "--unset=RAY_ADDRESS", "ray", "start", "--head", *_head_options(folder, head)
        )
        assert found.run(sys.executable, "-m", "db", "migrate").returncode == 0
        created = found.run("bitfrontier", "keys", "create", "tests", "--scope", "admin", "--rate", "100000")
        assert created.returncode == 0, created.stderr
        found.key = re.search(r"bf_[A-Za-z0-9_-]{43}", created.stdout)[0]
        apis = []
        for number in range(2):
            port = free_port()
            api = found.start(f"api-{number}", "bitfrontier", "api", "--port", str(port), BITFRONTIER_AUTH="keys")
            found.apis.append(f"http://127.0.0.1:{port}")
            apis.append(api)
        assert ray.wait(PATIENCE) == 0, found.log("ray-head")
        for number in range(2):
            # The second brings a node of its own into the cluster, as a container must.
            join = ["join-ray"] if number else []
            worker = found.start(f"worker-{number}", *join, sys.executable, "-m", "workers", "run")
            found.workers[worker.pid] = worker
        for number, api in enumerate(apis):
            with found.client(number) as client:
                wait_until(
                    lambda client=client, api=api: _answers(client) or api.poll() is not None,
                    "an API answers",
                    pause=0.1,
                )
            assert api.poll() is None, found.log(f"api-{number}")
        yield found


def _environment(folder: Path, url: str, password: str, models: Path) -> dict[str, str]:
    secret, token = folder / "postgres_password", folder / "ray_token"
    secret.write_text(password + "\n")
    token.write_text(secrets.token_hex(32) + "\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BITFRONTIER_", "RAY_", "PG"))}
    programs = f"{DOCKER}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {
        "PATH": programs,
        "OMP_NUM_THREADS": "1",
        "BITFRONTIER_DATABASE_URL": url,
        "BITFRONTIER_DATA": str(folder),
        "BITFRONTIER_MODELS": str(models),
        "BITFRONTIER_LOG_FORMAT": "json",
        "BITFRONTIER_GRACE_SECONDS": "10",
        "BITFRONTIER_POOL_SIZE": "1",
        "POSTGRES_PASSWORD_FILE": str(secret),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_OBJECT_STORE_BYTES": RAY_STORE,
        "COLUMNS": "200",
    }


def _head_options(folder: Path, port: int) -> list[str]:
    own = ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder / 'ray'}", "--num-cpus=1"]
    return [*own, "--include-dashboard=false", f"--object-store-memory={RAY_STORE}"]


def _answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/readyz").is_success
    return False


def _end_all(mark: str) -> None:
    ours = [process for process in psutil.process_iter() if _carries(process, mark)]
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(_lives(process) for process in ours), "all processes are gone", pause=0.1)


def _lives(process: psutil.Process) -> bool:
    # Who has no parent left to be waited for by stays as a zombie.
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:
        return False
