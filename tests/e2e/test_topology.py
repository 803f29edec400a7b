"""The topology of docker-compose.yml as processes: a Postgres of its own, two APIs, two workers, a Ray cluster."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import text

from db.candidates import candidates
from db.models import put_model
from db.searches import get_search
from tests import models
from tests.aside import PATIENCE, aside, wait_until
from tests.e2e.topology import Topology, topology

pytestmark = pytest.mark.long

REQUEST = {
    "model": "tiny",
    "target": "generic",
    "calibration": {"samples": 4, "sequence_length": 16},
    "sensitivity": ["fisher"],
    "optimizer": {"points": 4, "evaluations": 8},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    folder = tmp_path_factory.mktemp("models")
    source = models.tiny_bert(folder / "tiny")
    with topology(folder) as found:
        put_model(found.engine, "tiny", str(source), None)
        yield found


@dataclass
class Finished:
    """Three searches that went through the service, and what was seen of them."""

    searches: list[dict[str, Any]] = field(default_factory=list)
    followed: list[list[dict[str, Any]]] = field(default_factory=list)
    """Of each search its events, as the API told them that did not take the search."""
    stopped: subprocess.Popen[bytes] | None = None
    """The worker that was asked to leave while it worked on the first search."""


@pytest.fixture(scope="module")
def finished(service: Topology) -> Finished:
    found = Finished()
    with service.client(0) as first, service.client(1) as second:
        posted = []
        for number, client in enumerate((first, second, first)):
            answer = client.post("/v1/searches", json=REQUEST | {"budgets": {"avg_bits": 5.0 + number}})
            assert answer.status_code == 202, answer.text
            posted.append(answer.json()["id"])
        streams = [
            aside(follow, client, search) for client, search in zip((second, first, second), posted, strict=True)
        ]
        wait_until(lambda: any(candidate.metrics for candidate in candidates(service.engine, posted[0])))
        found.stopped = service.workers[int(owner(service, posted[0]).split(":")[1])]
        found.stopped.send_signal(signal.SIGTERM)
        found.followed = [stream.result(2 * PATIENCE) for stream in streams]
        found.searches = [second.get(f"/v1/searches/{search}").json() for search in posted]
    return found


def test_searches_that_different_apis_took_all_succeed(service: Topology, finished: Finished) -> None:
    assert [search["state"] for search in finished.searches] == ["succeeded"] * 3
    for number, search in enumerate(finished.searches):
        with service.client(number % 2) as client:
            frontier = client.get(f"/v1/searches/{search['id']}/frontier").json()
        assert frontier["points"]
        assert all(point["costs"]["avg_bits"] <= 5.0 + number for point in frontier["points"])


def test_the_other_api_tells_every_event_once_and_in_order(service: Topology, finished: Finished) -> None:
    for search, events in zip(finished.searches, finished.followed, strict=True):
        with service.engine.connect() as connection:
            stored = connection.execute(
                text("SELECT id FROM events WHERE search_id = :search ORDER BY id"), {"search": search["id"]}
            )
            assert [event["id"] for event in events] == list(stored.scalars())
        assert events[-1]["data"]["state"] == "succeeded"


def test_a_worker_that_is_asked_to_leave_hands_its_search_to_the_other(service: Topology, finished: Finished) -> None:
    assert finished.stopped is not None
    assert finished.stopped.wait(PATIENCE) == 0
    taken_over = get_search(service.engine, finished.searches[0]["id"])
    assert taken_over.attempt >= 2
    assert {int(owner(service, search["id"]).split(":")[1]) for search in finished.searches} <= (
        set(service.workers) - {finished.stopped.pid}
    )


def test_both_apis_count_the_same(service: Topology, finished: Finished) -> None:
    counted = []
    for number in range(2):
        with service.client(number) as client:
            exposed = client.get("/metrics").text
        counted.append(dict(re.findall(r'^bitfrontier_searches\{state="(\w+)"\} (\S+)$', exposed, re.M)))
    assert counted[0] == counted[1]
    assert float(counted[0]["succeeded"]) == 3


def test_a_container_of_a_worker_is_healthy_as_long_as_its_worker_lives(service: Topology, finished: Finished) -> None:
    assert service.run("worker-healthy").returncode == 0


@pytest.mark.parametrize("path", ["/", "/v1/searches", "/v1/searches/1", "/v1/searches/1/events", "/metrics"])
def test_neither_api_lets_in_who_has_no_key(service: Topology, path: str) -> None:
    for url in service.apis:
        assert httpx.get(url + path, trust_env=False).status_code in (303, 401)


def test_the_database_asks_for_a_password_and_the_service_is_no_superuser_there(service: Topology) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(service.environment["BITFRONTIER_DATABASE_URL"])
    with service.engine.connect() as connection:
        assert not connection.scalar(text("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"))


def test_the_cluster_is_closed_to_who_has_another_token(service: Topology, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    address = service.environment["RAY_ADDRESS"]
    reached = service.run("ray", "health-check", "--address", address)
    refused = service.run("ray", "health-check", "--address", address, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert reached.returncode == 0
    assert "InvalidAuthToken" in refused.stderr


def owner(service: Topology, search: int) -> str:
    """Who has worked on a search last: host:pid:life."""
    query = text("SELECT owner FROM searches WHERE id = :search")
    with service.engine.connect() as connection:
        return str(connection.scalar(query, {"search": search}))


def follow(client: httpx.Client, search: int) -> list[dict[str, Any]]:
    """The events of a search until it is finished."""
    events: list[dict[str, Any]] = []
    with client.stream("GET", f"/v1/searches/{search}/events", timeout=PATIENCE) as response:
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                events.append({"id": int(fields["id"]), "kind": fields["event"], "data": json.loads(fields["data"])})
                fields = {}
                if events[-1]["data"].get("state") in ("succeeded", "failed", "cancelled"):
                    break
    return events
