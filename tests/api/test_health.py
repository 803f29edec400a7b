"""`/healthz` answers for the process, `/readyz` for the database with its schema."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, make_url

from api.documents import Problem
from db import readiness
from tests.api.conftest import Deaf, look_at


def refused(client: TestClient, path: str) -> Problem:
    answer = client.get(path)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    return Problem.model_validate(answer.json())


def test_ready_while_the_database_answers(client: TestClient) -> None:
    assert client.get("/readyz").json() == {"status": "ok"}


def test_without_a_database_requests_are_refused_and_the_process_lives(client: TestClient) -> None:
    look_at(client, make_url("postgresql+psycopg://nobody:hidden@/none?host=/nowhere"))
    for path in ("/readyz", "/v1/searches"):
        problem = refused(client, path)
        assert problem.type == "urn:bitfrontier:problem:database-unavailable"
        assert "nobody" not in problem.detail
    assert client.get("/healthz").status_code == 200


def test_a_database_that_hangs_is_given_up_within_two_seconds_and_asked_again_later(
    client: TestClient, deaf: Deaf, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert readiness.SECONDS < 2
    monkeypatch.setattr(readiness, "SECONDS", 0.2)
    monkeypatch.setattr(readiness, "FRESH_SECONDS", 3600.0)
    look_at(client, deaf.url)
    for _ in range(3):
        assert "did not answer within" in refused(client, "/readyz").detail
    assert deaf.asked == 1, "the answer holds for a moment: asking often opens no connections"


@pytest.mark.parametrize(
    ("version", "ready"),
    [("0001", False), (None, False), ("9999_of_a_newer_version", True)],
)
def test_ready_needs_the_schema_of_this_version_or_a_newer_one(
    client: TestClient, engine: Engine, version: str | None, ready: bool
) -> None:
    """While a newer version takes over, the older one goes on."""
    with engine.begin() as connection:
        present = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one()
        connection.exec_driver_sql("DELETE FROM alembic_version")
        if version:
            connection.exec_driver_sql(f"INSERT INTO alembic_version VALUES ('{version}')")
    try:
        if ready:
            assert client.get("/readyz").status_code == 200
        else:
            assert "schema is older" in refused(client, "/readyz").detail
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM alembic_version")
            connection.exec_driver_sql(f"INSERT INTO alembic_version VALUES ('{present}')")
