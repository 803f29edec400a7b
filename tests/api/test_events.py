from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import httpx
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.commands.client import Client
from db.events import add_event, events_after
from db.queue import progress
from search.request import SearchRequest
from tests.api import examples


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


def test_followers_hear_at_once_and_hold_no_thread(served: str, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)

    def stream(into: list[tuple[float, str]]) -> None:
        with httpx.stream("GET", f"{served}/v1/searches/{search_id}/events", timeout=20) as response:
            into.extend((time.monotonic(), line) for line in lines(response))

    heard: list[list[tuple[float, str]]] = [[] for _ in range(60)]
    threads = [threading.Thread(target=stream, args=(into,)) for into in heard]
    for thread in threads:
        thread.start()
    time.sleep(2)
    start = time.monotonic()
    assert httpx.get(f"{served}/v1/searches").status_code == 200, "more followers than threads, and it answers"
    assert time.monotonic() - start < 2
    said = time.monotonic()
    progress(engine, held, "sensitivity", 1, 2)
    time.sleep(1)
    examples.report(engine, held, SearchRequest.model_validate(examples.REQUEST))
    for thread in threads:
        thread.join(20)
    assert len({tuple(line for _, line in into) for into in heard}) == 1, "all heard the same"
    first = next(at for at, line in heard[0] if '"sensitivity"' in line)
    assert first - said < 1, "woken, not polled"


def lines(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line:
            yield line


def test_stream_outlives_the_listening_connection(served: str, engine: Engine) -> None:
    search_id, _held = examples.claimed_search(engine)
    with httpx.stream("GET", f"{served}/v1/searches/{search_id}/events", timeout=20) as response:
        incoming = lines(response)
        next(incoming)
        with engine.begin() as connection:
            query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE left(query, 6) = 'LISTEN'"
            connection.exec_driver_sql(query)
        add_event(engine, search_id, "notice", {"message": "still here"})
        assert any("still here" in line for line in incoming)


def test_client_follows_to_the_end(served: str, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    work = threading.Thread(target=examples.report, args=(engine, held, SearchRequest.model_validate(examples.REQUEST)))
    with Client(served) as client:
        following = client.follow(search_id, lambda: None)
        assert next(following).data["state"] == "queued"
        work.start()
        kinds = [event.kind for event in following]
    work.join()
    assert kinds[0] == "state"
    assert {"progress", "measured"} < set(kinds)
    assert kinds[-1] == "state"
