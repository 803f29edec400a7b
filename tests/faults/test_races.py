"""Two that want the same at once, and one that asks again because no answer came."""

import socket
from collections.abc import Callable
from functools import partial

import httpx
import pytest
from sqlalchemy import text

from db import queue
from db.events import events_after
from tests.aside import PATIENCE, aside
from tests.faults.processes import FORKING, Forked, serve
from tests.faults.racing import race
from tests.faults.service import REQUEST, Service
from tests.faults.traps import HOLD, LOSE_ANSWER

pytestmark = pytest.mark.long

ROUNDS = 1000
STAGES = ["profile", "sensitivity", "baselines", "optimize", "measure", "refine", "accept"]


def test_of_two_workers_that_race_for_a_search_one_wins_a_thousand_times_of_a_thousand(service: Service) -> None:
    service.execute(
        "INSERT INTO searches (state, request, model, target, owner, lease_until) "
        f"SELECT 'running', '{{}}', 'm', 't', 'nobody', now() + interval '1 hour' FROM generate_series(1, {ROUNDS})"
    )
    barrier, won = FORKING.Barrier(2), FORKING.SimpleQueue()
    racers = [
        service.start(partial(race, service.url, owner, ROUNDS, barrier, won, leads=owner == "one"), {})
        for owner in ("one", "other")
    ]
    # What each has won fits into the queue: neither waits for somebody to take it.
    assert [racer.join(2 * PATIENCE) for racer in racers] == [0, 0], service.told()
    got = [won.get(), won.get()]
    assert sorted(got[0] + got[1]) == list(range(1, ROUNDS + 1))
    assert all(got), "one of the two never came first"
    running = "SELECT search_id FROM events WHERE data->>'state' = 'running'"
    with service.engine.connect() as connection:
        claimed = connection.execute(text("SELECT attempt, owner FROM searches WHERE owner <> 'nobody'")).all()
        told = list(connection.execute(text(running)).scalars())
    assert [attempt for attempt, _ in claimed] == [1] * ROUNDS
    assert sorted(sum(owner == name for _, owner in claimed) for name in ("one", "other")) == sorted(map(len, got))
    assert sorted(told) == list(range(1, ROUNDS + 1))


def test_a_search_is_cancelled_in_every_stage_and_in_no_later_one(service: Service) -> None:
    """One worker outlives them all."""
    service.worker()
    begins, cancelled = "NEW.kind = 'stage' AND NEW.data->>'stage' = '{}'", dict[str, int]()
    for stage in [*STAGES, "evolve"]:
        trap = service.traps.lay("events", "INSERT", HOLD, when=begins.format(stage))
        search_id = service.post("evolution" if stage == "evolve" else "refine")
        service.until(lambda trap=trap: trap.holds, f"{stage} begins")
        asked = aside(queue.cancel, service.engine, search_id)
        service.until(service.traps.queueing, "the cancel is next")
        trap.open()
        service.until_ended()
        assert asked.result(PATIENCE) == "running"
        cancelled[stage] = search_id
        service.execute("DELETE FROM results WHERE kind = 'measure'")
    service.stop()
    for stage, search_id in cancelled.items():
        told = events_after(service.engine, search_id, 0)
        assert [event.data["state"] for event in told if event.kind == "state"] == ["queued", "running", "cancelled"]
        assert told[-1].data == {"state": "cancelled"}
        assert [event.data["stage"] for event in told if event.kind == "stage"][-1] == stage


@pytest.fixture
def start_api(service: Service) -> Callable[[], Forked]:
    """Starts the API at `service.api`, and returns once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service.api = f"http://127.0.0.1:{port}"

    def start() -> Forked:
        api = service.start(partial(serve, port), {"BITFRONTIER_DATABASE_URL": service.url, "BITFRONTIER_AUTH": "open"})
        service.until(lambda: is_ready(service.api), "the API answers")
        return api

    return start


def is_ready(api: str) -> bool:
    try:
        return httpx.get(f"{api}/readyz").is_success
    except httpx.TransportError:
        return False


def test_an_api_killed_between_insert_and_response_takes_a_search_once(
    service: Service, start_api: Callable[[], Forked]
) -> None:
    """Whether it died before the commit or after it."""
    trap = service.traps.lay("searches", "INSERT", HOLD, LOSE_ANSWER)

    def post() -> httpx.Response:
        headers = {"Idempotency-Key": "once"}
        return httpx.post(f"{service.api}/v1/searches", json=REQUEST, headers=headers, timeout=PATIENCE)

    api = start_api()
    asked = aside(post)
    service.until(lambda: trap.holds or asked.done(), "the search is inserted")
    assert not asked.done(), asked.result().text
    api.kill()
    trap.open()
    with pytest.raises(httpx.TransportError):
        asked.result(PATIENCE)
    assert ids(service) == []

    api = start_api()
    asked = aside(post)
    service.until(service.traps.unanswered, "the search is committed")
    api.kill()
    with pytest.raises(httpx.TransportError):
        asked.result(PATIENCE)
    service.until(service.traps.cut, "its connection ends")
    service.until(lambda: len(ids(service)) == 1, "the search is there")

    start_api()
    (only,) = ids(service)
    answers = [post(), post()]
    assert [answer.status_code for answer in answers] == [202, 202], answers[0].text + service.told()
    assert {answer.json()["id"] for answer in answers} == {only}
    assert ids(service) == [only]
    assert [event.data for event in events_after(service.engine, only, 0)] == [{"state": "queued"}]


def ids(service: Service) -> list[int]:
    with service.engine.connect() as connection:
        return list(connection.execute(text("SELECT id FROM searches")).scalars())
