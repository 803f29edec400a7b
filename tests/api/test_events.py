from __future__ import annotations

import json
import time
from collections.abc import Iterator
from threading import Semaphore

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api import followers
from api.app import create_app
from db.events import events_after, tell
from db.notify import EVENTS
from db.queue import progress, succeed
from tests.api import examples
from tests.api.conftest import OPEN, serving
from tests.aside import PATIENCE, aside, results, wait_until


def ids(text: str) -> list[int]:
    return [int(line.removeprefix("id: ")) for line in text.splitlines() if line.startswith("id: ")]


def test_finished_search_streams_everything_and_ends(client: TestClient, engine: Engine) -> None:
    search_id = examples.finished_search(engine)
    stored = [event.id for event in events_after(engine, search_id, 0)]
    answer = client.get(f"/v1/searches/{search_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert ids(answer.text) == stored
    assert '"state":"succeeded"' in answer.text.replace(" ", "")
    resumed = client.get(f"/v1/searches/{search_id}/events", headers={"Last-Event-ID": str(stored[3])})
    assert ids(resumed.text) == stored[4:]
    assert ids(client.get(f"/v1/searches/{search_id}/events?after={stored[-1]}").text) == []


def test_stage_of_a_metric_says_what_it_will_take(client: TestClient, engine: Engine) -> None:
    search_id = examples.finished_search(engine)
    text = client.get(f"/v1/searches/{search_id}/events").text
    data = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    (event,) = (item for item in data if item.get("metric") == "pqi")
    assert (event["stage"], event["forward_passes"], event["estimated_seconds"]) == ("sensitivity", 22.0, 41.0)
    assert event["about"] == "pqi, about 41 s (22 forward passes)"
    assert all("about" not in item for item in data if "metric" not in item)


@pytest.fixture
def unpolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks for news by himself."""
    for name in ("WAIT_SECONDS", "POLL_SECONDS"):
        monkeypatch.setattr(followers, name, 3600.0)


@pytest.mark.usefixtures("unpolled")
def test_followers_are_woken_hold_no_thread_and_what_they_hear_is_read_once(engine: Engine, queries: list[str]) -> None:
    """Sixty streams of one search: no thread and no connection each, and one query for what is new to all of them."""
    search_id, held = examples.claimed_search(engine)
    begun = Semaphore(0)
    with serving(create_app(engine, OPEN)) as url:

        def stream() -> list[str]:
            heard = []
            with httpx.stream("GET", f"{url}/v1/searches/{search_id}/events", timeout=PATIENCE) as response:
                for line in lines(response):
                    heard.append(line)
                    if '"running"' in line:
                        begun.release()
            return heard

        streams = [aside(stream) for _ in range(60)]
        for _ in streams:
            assert begun.acquire(timeout=PATIENCE)
        answer = httpx.get(f"{url}/v1/searches", timeout=PATIENCE)
        assert answer.status_code == 200, "more followers than threads, and it answers"
        del queries[:]
        for done in range(10):
            progress(engine, held, "measure", done, 20)
            time.sleep(0.05)
        assert len([query for query in queries if "FROM events" in query]) <= 30, "not one for each follower"
        succeed(engine, held, {})
        heard = results(streams)
    assert len({tuple(one) for one in heard}) == 1, "all heard the same"
    assert '"measure"' in str(heard[0])


def lines(response: httpx.Response) -> Iterator[str]:
    """What is told; comments only keep the stream open."""
    return (line for line in response.iter_lines() if line and not line.startswith(":"))


def test_idle_streams_ask_nothing(engine: Engine, queries: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "WAIT_SECONDS", 0.05)
    search_id, held = examples.claimed_search(engine)
    url = f"/v1/searches/{search_id}/events"
    with (
        serving(create_app(engine, OPEN)) as service,
        httpx.stream("GET", service + url, timeout=PATIENCE) as response,
    ):
        incoming = lines(response)
        assert any('"running"' in line for line in incoming)

        def quiet() -> bool:
            del queries[:]
            time.sleep(0.5)
            return not queries

        wait_until(quiet, "it has looked ten times and asked nothing")
        succeed(engine, held, {})
        assert any('"succeeded"' in line for line in incoming)


def test_more_streams_than_a_process_holds_are_refused_until_one_ends(engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    app = create_app(engine, OPEN.model_copy(update={"max_streams": 1}))
    with serving(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        path = f"/v1/searches/{search_id}/events"
        with client.stream("GET", path) as first:
            incoming = lines(first)
            next(incoming)
            refused = client.get(path)
            assert (refused.status_code, refused.json()["type"]) == (503, "urn:bitfrontier:problem:too-many-streams")
            assert int(refused.headers["retry-after"]) > 0
        succeed(engine, held, {})
        wait_until(lambda: client.get(path).status_code == 200, "the stream that was left counts no more")
        assert '"succeeded"' in client.get(path).text


def test_a_long_log_is_told_whole_to_early_and_late_followers(engine: Engine) -> None:
    """More events than are read at once or kept in memory."""
    search_id, held = examples.claimed_search(engine)
    with engine.begin() as connection:
        told = "INSERT INTO events (search_id, kind, data) SELECT %s, 'notice', '{}' FROM generate_series(1, %s)"
        connection.exec_driver_sql(told, (search_id, 700))
    with serving(create_app(engine, OPEN)) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        path = f"/v1/searches/{search_id}/events"
        with client.stream("GET", path) as early:
            incoming = lines(early)
            begun = [next(incoming)]
            with engine.begin() as connection:
                connection.exec_driver_sql(told, (search_id, 2600))
                connection.exec_driver_sql(f"NOTIFY {EVENTS}, '{search_id}'")
            succeed(engine, held, {})
            late = client.get(path)
            heard = ids("\n".join([*begun, *incoming]))
        stored = [event.id for event in events_after(engine, search_id, 0, limit=10_000)]
    assert len(stored) > 3300
    assert heard == stored == ids(late.text)


def test_stream_outlives_the_listening_connection(served: str, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    with httpx.stream("GET", f"{served}/v1/searches/{search_id}/events", timeout=PATIENCE) as response:
        incoming = lines(response)
        next(incoming)
        with engine.begin() as connection:
            query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE left(query, 6) = 'LISTEN'"
            connection.exec_driver_sql(query)
        tell(engine, held, "notice", {"message": "still here"}, "notice")
        assert any("still here" in line for line in incoming)


@pytest.mark.usefixtures("unpolled")
def test_stream_outlives_what_others_say_on_its_channel(served: str, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    with httpx.stream("GET", f"{served}/v1/searches/{search_id}/events", timeout=PATIENCE) as response:
        incoming = lines(response)
        next(incoming)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"NOTIFY {EVENTS}, 'x'")
        tell(engine, held, "notice", {"message": "still here"}, "notice")
        assert any("still here" in line for line in incoming), "woken, not polled"
