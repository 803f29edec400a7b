"""What every attack needs: the application on the run's Postgres, and the state that it must not change."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text

import search
from api.app import create_app
from api.commands.service import api_command, free_port
from api.documents import Problem
from db.tables import Base
from tests.api import examples
from tests.api.conftest import OPEN, clock  # noqa: F401 - pytest looks for it here
from tests.aside import PATIENCE, wait_until

TABLES = tuple(Base.metadata.tables)
LONGEST = 12_000
"""Bytes of a problem document, whatever was sent."""
PLACES = (str(Path(search.__file__).parent.parent), sys.prefix, tempfile.gettempdir())
OURS = (*PLACES, "Traceback", 'File "', "psycopg", "sqlalchemy", "pydantic")
"""What no answer says of this machine or of how the service is made."""


@contextmanager
def api_process(postgres_url: str, **settings: str) -> Iterator[tuple[int, psutil.Process]]:
    """The API as it is deployed, in a process of its own; its port."""
    port = free_port()
    environment = os.environ | {
        "BITFRONTIER_DATABASE_URL": postgres_url,
        "BITFRONTIER_AUTH": "open",
        "BITFRONTIER_LOG": "warning",
    }
    environment |= settings
    child = subprocess.Popen(api_command("127.0.0.1", port), env=environment)

    def ready() -> bool:
        assert child.poll() is None, "it lives"
        with suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
        return False

    try:
        wait_until(ready, "the API answers", pause=0.1)
        yield port, psutil.Process(child.pid)
        child.terminate()
        child.wait(PATIENCE)
    finally:
        child.kill()
        child.wait()


@pytest.fixture(scope="module")
def emptied(migrated_engine: Engine) -> Engine:
    """An engine on the run's Postgres; its tables are emptied once, for a module that has them all to itself."""
    with migrated_engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {', '.join(TABLES)} RESTART IDENTITY"))
    return migrated_engine


@pytest.fixture(scope="module")
def attacked(emptied: Engine) -> Iterator[TestClient]:
    """A client of an open service with one finished search."""
    examples.finished_search(emptied)
    with TestClient(create_app(emptied, OPEN), raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


@pytest.fixture
def unharmed(attacked: TestClient, emptied: Engine) -> Iterator[None]:
    """Afterwards the database is as it was, and the service answers."""
    before = state(emptied)
    yield
    assert state(emptied) == before
    assert attacked.get("/v1/searches/1").json()["state"] == "succeeded"


def state(engine: Engine) -> dict[str, str]:
    """A digest of every table."""
    digest = "SELECT coalesce(md5(string_agg(row::text, '' ORDER BY row::text)), '') FROM {} AS row"
    with engine.connect() as connection:
        return {table: connection.execute(text(digest.format(table))).scalar_one() for table in TABLES}


def wrong(answer: httpx.Response, sent: str = "") -> str | None:
    """What is wrong with the refusal of what was `sent`; None when it is one as it should be."""
    if not 400 <= answer.status_code < 500:
        return f"answered {answer.status_code}: {answer.text[:300]}"
    if answer.headers["content-type"] != "application/problem+json":
        return f"answered {answer.headers['content-type']}"
    Problem.model_validate(answer.json(), strict=True)
    if answer.json()["request_id"] != answer.headers["x-request-id"]:
        return "another request id"
    told = [words for words in OURS if words in answer.text and words not in sent]
    return f"told {told}" if told else "answered at length" if len(answer.content) > LONGEST else None


def all_refused(cases: dict[Any, Callable[[], httpx.Response]], sent: str = "") -> None:
    """Send every case; each must be refused with a problem document."""
    found = {case: told for case, send in cases.items() if (told := wrong(send(), sent or str(case)))}
    assert not found
