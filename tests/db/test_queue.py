from __future__ import annotations

import math
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.dialects import postgresql

from db import queue
from db.engine import connect
from db.events import events_after
from db.queue import Claim, LeaseLost
from db.searches import Search, create_search, get_search, set_summary
from search.errors import NotFound
from tests.db.conftest import request_for

LEASE = timedelta(seconds=30)
OUT_OF_MEMORY = {"type": "urn:bitfrontier:problem:test", "title": "T", "status": 500, "detail": "out of memory"}

Expire = Callable[[int], None]


def taken(engine: Engine, owner: str = "one") -> Claim:
    claim = queue.claim(engine, owner, LEASE)
    assert claim is not None
    return claim


def states(engine: Engine, search_id: int) -> list[str]:
    return [event.data["state"] for event in events_after(engine, search_id, 0) if event.kind == "state"]


def drain(engine: Engine, owner: str) -> list[int]:
    mine = []
    while (claim := queue.claim(engine, owner, LEASE)) is not None:
        mine.append(claim.search_id)
        queue.succeed(engine, claim, {})
    return mine


def drain_process(url: str, owner: str, finished: Any) -> None:
    engine = connect(url)
    finished.put(drain(engine, owner))
    engine.dispose()


def test_a_claim_runs_the_search(engine: Engine, queued: Search) -> None:
    claim = taken(engine, "me")
    assert claim == Claim(queued.id, 1, "me")
    search = get_search(engine, queued.id)
    assert (search.state, search.owner, search.attempt) == ("running", "me", 1)
    assert search.started_at is not None
    assert search.lease_until is not None
    assert search.lease_until > search.started_at
    assert queue.claim(engine, "other", LEASE) is None


def test_the_highest_priority_then_the_oldest(engine: Engine) -> None:
    ids = [create_search(engine, request_for())[0].id for _ in range(3)]
    with engine.begin() as connection:
        connection.execute(text("UPDATE searches SET priority = 1 WHERE id = :id"), {"id": ids[2]})
    assert [taken(engine).search_id for _ in range(3)] == [ids[2], ids[0], ids[1]]


def test_four_threads_lose_and_double_nothing(engine: Engine) -> None:
    ids = [create_search(engine, request_for())[0].id for _ in range(60)]
    finished: list[int] = []
    threads = [
        threading.Thread(target=lambda owner=f"thread {n}": finished.extend(drain(engine, owner))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(finished) == ids
    assert all(states(engine, search_id) == ["queued", "running", "succeeded"] for search_id in ids)


def test_four_processes_lose_and_double_nothing(engine: Engine, postgres_url: str) -> None:
    ids = [create_search(engine, request_for())[0].id for _ in range(60)]
    spawn = multiprocessing.get_context("spawn")
    finished = spawn.Queue()
    processes = [spawn.Process(target=drain_process, args=(postgres_url, f"process {n}", finished)) for n in range(4)]
    for process in processes:
        process.start()
    counts = Counter(search_id for _ in processes for search_id in finished.get(timeout=60))
    for process in processes:
        process.join()
    assert counts == Counter(ids)


WRITES: dict[str, Callable[[Engine, Claim], Any]] = {
    "heartbeat": lambda engine, claim: queue.heartbeat(engine, claim, LEASE),
    "progress": lambda engine, claim: queue.progress(engine, claim, "measure", 1, 2),
    "set_summary": lambda engine, claim: set_summary(engine, claim, {}),
    "succeed": lambda engine, claim: queue.succeed(engine, claim, {}),
    "fail": lambda engine, claim: queue.fail(engine, claim, OUT_OF_MEMORY),
    "release": lambda engine, claim: queue.release(engine, claim),
    "cancelled": lambda engine, claim: queue.cancelled(engine, claim),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("successor", ["two", "one"], ids=["another worker", "the same worker again"])
def test_a_successor_shuts_out_the_worker_before(
    engine: Engine, queued: Search, expire: Expire, write: Callable[[Engine, Claim], Any], successor: str
) -> None:
    stale = taken(engine, "one")
    expire(queued.id)
    current = taken(engine, successor)
    assert current.attempt == 2
    before = get_search(engine, queued.id), events_after(engine, queued.id, 0)
    with pytest.raises(LeaseLost):
        write(engine, stale)
    assert (get_search(engine, queued.id), events_after(engine, queued.id, 0)) == before
    write(engine, current)


def test_a_late_heartbeat_keeps_a_search_that_nobody_took(engine: Engine, queued: Search, expire: Expire) -> None:
    claim = taken(engine)
    expire(queued.id)
    assert queue.heartbeat(engine, claim, LEASE) is False
    assert queue.claim(engine, "other", LEASE) is None


def test_workers_that_die_use_up_the_attempts(engine: Engine, queued: Search, expire: Expire) -> None:
    for attempt in (1, 2, 3):
        assert taken(engine).attempt == attempt
        expire(queued.id)
    assert queue.claim(engine, "four", LEASE) is None
    search = get_search(engine, queued.id)
    assert search.state == "failed"
    assert search.finished_at is not None
    assert search.error is not None
    assert search.error["type"] == "urn:bitfrontier:problem:attempts-exhausted"
    assert search.error["detail"].startswith("3 attempts ended before the search did")
    assert states(engine, queued.id) == ["queued", "running", "running", "running", "failed"]


def test_the_last_error_outlives_the_attempts(engine: Engine, queued: Search) -> None:
    for _ in range(3):
        queue.release(engine, taken(engine), OUT_OF_MEMORY)
    assert queue.claim(engine, "four", LEASE) is None
    error = get_search(engine, queued.id).error
    assert error is not None
    assert error["last_error"] == OUT_OF_MEMORY
    assert error["detail"].endswith("out of memory")


def test_a_worker_that_is_asked_to_stop_costs_no_attempt(engine: Engine, queued: Search) -> None:
    for attempt in range(1, 6):
        claim = taken(engine)
        assert claim.attempt == attempt
        queue.release(engine, claim)
        assert get_search(engine, queued.id).state == "queued"
    assert taken(engine).attempt == 6


def test_progress_is_a_row_and_an_event(engine: Engine, queued: Search) -> None:
    claim = taken(engine)
    queue.progress(engine, claim, "measure", 3, 20)
    search = get_search(engine, queued.id)
    assert (search.stage, search.done, search.total) == ("measure", 3, 20)
    assert events_after(engine, queued.id, 0)[-1].data == {"stage": "measure", "done": 3, "total": 20}


def test_success_keeps_the_summary_and_drops_the_last_error(engine: Engine, queued: Search) -> None:
    queue.release(engine, taken(engine), OUT_OF_MEMORY)
    queue.succeed(engine, taken(engine), {"reused": 3})
    search = get_search(engine, queued.id)
    assert (search.state, search.summary, search.error) == ("succeeded", {"reused": 3}, None)
    assert search.lease_until is None


def test_failure_is_final(engine: Engine, queued: Search) -> None:
    queue.fail(engine, taken(engine), OUT_OF_MEMORY)
    search = get_search(engine, queued.id)
    assert (search.state, search.error) == ("failed", OUT_OF_MEMORY)
    assert queue.claim(engine, "two", LEASE) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "a\0b"], ids=repr)
def test_what_is_not_json_is_refused_and_changes_nothing(engine: Engine, queued: Search, bad: Any) -> None:
    claim = taken(engine)
    with pytest.raises(ValueError, match="JSON"):
        queue.succeed(engine, claim, {"loss": [bad]})
    assert get_search(engine, queued.id).state == "running"


class TestCancel:
    def test_a_queued_search_at_once(self, engine: Engine, queued: Search) -> None:
        assert queue.cancel(engine, queued.id) == "cancelled"
        assert queue.cancel(engine, queued.id) == "cancelled"
        assert queue.claim(engine, "one", LEASE) is None
        assert states(engine, queued.id) == ["queued", "cancelled"]

    def test_a_running_search_by_its_worker(self, engine: Engine, queued: Search) -> None:
        claim = taken(engine)
        assert queue.heartbeat(engine, claim, LEASE) is False
        assert queue.cancel(engine, queued.id) == "running"
        assert queue.cancel(engine, queued.id) == "running"
        assert queue.heartbeat(engine, claim, LEASE) is True
        queue.cancelled(engine, claim)
        assert get_search(engine, queued.id).state == "cancelled"
        assert states(engine, queued.id) == ["queued", "running", "cancelled"]

    def test_a_running_search_whose_worker_is_dead_at_once(
        self, engine: Engine, queued: Search, expire: Expire
    ) -> None:
        claim = taken(engine)
        expire(queued.id)
        assert queue.cancel(engine, queued.id) == "cancelled"
        with pytest.raises(LeaseLost):
            queue.heartbeat(engine, claim, LEASE)

    def test_a_running_search_whose_worker_dies_before_it_confirms(
        self, engine: Engine, queued: Search, expire: Expire
    ) -> None:
        taken(engine)
        queue.cancel(engine, queued.id)
        expire(queued.id)
        assert queue.claim(engine, "two", LEASE) is None
        assert get_search(engine, queued.id).state == "cancelled"

    def test_a_running_search_that_its_worker_gives_back(self, engine: Engine, queued: Search) -> None:
        claim = taken(engine)
        queue.cancel(engine, queued.id)
        queue.release(engine, claim)
        assert get_search(engine, queued.id).state == "cancelled"

    def test_a_finished_search_stays(self, engine: Engine) -> None:
        succeeded, failed = (create_search(engine, request_for())[0].id for _ in range(2))
        queue.succeed(engine, taken(engine), {})
        queue.fail(engine, taken(engine), OUT_OF_MEMORY)
        assert queue.cancel(engine, succeeded) == "succeeded"
        assert queue.cancel(engine, failed) == "failed"

    def test_an_unknown_search_is_not_found(self, engine: Engine) -> None:
        with pytest.raises(NotFound):
            queue.cancel(engine, 17)


class TestWait:
    def test_ends_at_the_timeout(self, engine: Engine) -> None:
        begun = time.monotonic()
        queue.wait(engine, 0.3)
        assert 0.25 < time.monotonic() - begun < 2

    def test_ends_at_once_when_a_search_is_due(self, engine: Engine, queued: Search) -> None:
        begun = time.monotonic()
        queue.wait(engine, 20)
        assert time.monotonic() - begun < 5

    def test_ends_when_a_search_is_queued(self, engine: Engine) -> None:
        timer = threading.Timer(0.3, create_search, (engine, request_for()))
        begun = time.monotonic()
        timer.start()
        queue.wait(engine, 20)
        assert 0.25 < time.monotonic() - begun < 5
        timer.join()

    def test_many_who_wait_leave_the_pool_to_others(self, engine: Engine) -> None:
        waiting = [threading.Thread(target=queue.wait, args=(engine, 2)) for _ in range(25)]
        for thread in waiting:
            thread.start()
        time.sleep(0.5)
        begun = time.monotonic()
        assert queue.claim(engine, "one", LEASE) is None
        assert time.monotonic() - begun < 1
        for thread in waiting:
            thread.join()


def test_the_claim_reads_its_index(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO searches (state, request, model, target, priority, lease_until) SELECT"
                " (ARRAY['succeeded', 'failed', 'cancelled', 'queued', 'running'])[least(1 + n % 50, 5)],"
                " '{}', 'm', 't', n % 3, now() + interval '1 minute' FROM generate_series(1, 5000) n"
            )
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE searches"))
        statement = queue.next_runnable().compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})
        plan = "\n".join(connection.execute(text(f"EXPLAIN {statement}")).scalars())
    assert "Index Scan using searches_unfinished" in plan, plan
    assert "Sort" not in plan, plan
