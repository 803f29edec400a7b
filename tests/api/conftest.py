"""The application on the run's Postgres: in process, and behind a real server; open, and asking for keys."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from limits.aio.storage import memory
from sqlalchemy import URL, Engine, create_engine, event, make_url

from api.app import create_app
from api.connection import Connection
from api.settings import Settings
from db.keys import create_key
from db.readiness import Readiness
from tests.aside import PATIENCE, wait_until

OPEN = Settings(auth="open", hosts=("testserver",))
KEYS = Settings(auth="keys")


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    """A client of a service that asks for no key."""
    with TestClient(create_app(engine, OPEN), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def keyed(engine: Engine) -> Iterator[TestClient]:
    """A client, without a key, of a service that asks for one."""
    with TestClient(create_app(engine, KEYS), raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


@pytest.fixture
def bearer(engine: Engine) -> Callable[..., dict[str, str]]:
    """Makes a key, and the header that sends it: `bearer("ci", "read", rate_per_minute=2)`."""

    def make(name: str = "ci", scope: str = "write", **limits: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {create_key(engine, name, {scope}, **limits)[1]}"}

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of what was asked within a minute, in seconds; it stands still unless a test sets its `now`.

    When a minute of the real clock ends between two requests, some of what was spent is given back.
    """
    clock = SimpleNamespace(now=time.time())
    monkeypatch.setattr(memory, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


@pytest.fixture
def served(engine: Engine) -> Iterator[str]:
    """The URL of a real server that asks for no key."""
    with serving(create_app(engine, OPEN)) as url:
        yield url


@pytest.fixture
def keyed_served(engine: Engine) -> Iterator[str]:
    """The URL of a real server that asks for keys."""
    with serving(create_app(engine, KEYS)) as url:
        yield url


@pytest.fixture
def queries(engine: Engine) -> Iterator[list[str]]:
    """The statements that were sent."""
    sent: list[str] = []

    def write_down(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", write_down)
    yield sent
    event.remove(engine, "before_cursor_execute", write_down)


class Deaf:
    """A host that takes connections and never says a word."""

    def __init__(self, listening: socket.socket) -> None:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        self._listening = listening
        self._taken: list[socket.socket] = []
        self.url = make_url(f"postgresql+psycopg://nobody@127.0.0.1:{listening.getsockname()[1]}/none")

    @property
    def asked(self) -> int:
        """How many connections were made so far."""
        with suppress(BlockingIOError):
            while True:
                self._taken.append(self._listening.accept()[0])
        return len(self._taken)

    def close(self) -> None:
        for connection in self._taken:
            connection.close()


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    with socket.socket() as listening, closing(Deaf(listening)) as host:
        yield host


def look_at(client: TestClient, url: URL) -> None:
    """Let the application work on the database at `url` from now on."""
    state = client.app.state  # type: ignore[attr-defined]
    state.engine, state.readiness = create_engine(url), Readiness(url)
    state.telemetry.watch(state.engine, state.followers, state.readiness)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=Connection, log_config=None, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive(), "the server listens")
            assert thread.is_alive(), "the application starts"
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
        assert not thread.is_alive(), "the server stops"
