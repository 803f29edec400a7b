"""What is counted, is counted once."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine

from db import queue, tallies
from db.events import end_stage, events_after
from db.queue import Claim
from db.results import put_result
from db.searches import Search, count_by_state, create_search, oldest_queued_seconds
from tests.aside import aside, results
from tests.db.conftest import LEASE, request_for, taken

PROBLEM = {"type": "urn:bitfrontier:problem:test", "title": "T", "status": 500, "detail": "out of memory"}


def test_a_result_counts_when_it_is_new(engine: Engine, queued: Search) -> None:
    for key in ("a", "b", "a"):
        put_result(engine, key, "probe", 1, 0.5, queued.id)
    put_result(engine, "c", "measurement", 1, 0.5, None)
    assert tallies.read(engine) == {("results_computed", "probe"): 2, ("results_computed", "measurement"): 1}


def test_what_is_rolled_back_was_not_counted(engine: Engine) -> None:
    with engine.connect() as connection:
        tallies.add(connection, "results_computed", "probe", 1)
        connection.rollback()
    assert tallies.read(engine) == {}


def test_a_stage_counts_once_whichever_attempt_ends_it(engine: Engine, claim: Claim) -> None:
    assert end_stage(engine, claim, "sensitivity", 2.5, {"probe": 3, "kl": 1}, "kl")
    assert not end_stage(engine, claim, "sensitivity", 9.0, {"probe": 3}, "kl")
    assert end_stage(engine, claim, "sensitivity", 1.5, {}, "lrp")
    queue.release(engine, claim)
    again = taken(engine)
    assert not end_stage(engine, again, "sensitivity", 0.1, {"probe": 3}, "kl")
    assert tallies.read(engine) == {
        ("results_reused", "probe"): 3,
        ("results_reused", "kl"): 1,
        ("stage_count", "sensitivity"): 2,
        ("stage_seconds", "sensitivity"): 4.0,
    }
    told = [event.data for event in events_after(engine, claim.search_id, 0) if event.kind == "stage_end"]
    assert told[0] == {"stage": "sensitivity", "seconds": 2.5, "reused": {"probe": 3, "kl": 1}, "attempt": 1}
    assert len(told) == 2


def test_every_search_counts_where_it_ends_and_every_attempt_that_ends_before(
    engine: Engine, expire: Callable[[int], None]
) -> None:
    for _ in range(6):
        create_search(engine, request_for())
    queue.succeed(engine, taken(engine), {})
    queue.fail(engine, taken(engine), PROBLEM)
    queue.cancelled(engine, taken(engine))
    queue.release(engine, taken(engine))  # asked to stop: nothing failed
    queue.release(engine, taken(engine), PROBLEM)
    expire(taken(engine).search_id)
    taken(engine)
    assert tallies.read(engine) == {
        ("searches_finished", "succeeded"): 1,
        ("searches_finished", "failed"): 1,
        ("searches_finished", "cancelled"): 1,
        ("attempts_failed", ""): 2,
    }


def test_searches_given_up_by_others_count_too(engine: Engine, expire: Callable[[int], None]) -> None:
    to_cancel, to_fail = (create_search(engine, request_for())[0].id for _ in range(2))
    queue.claim(engine, "one", LEASE)
    queue.cancel(engine, to_cancel)
    expire(to_cancel)
    for _ in range(3):
        queue.claim(engine, "two", LEASE)
        expire(to_fail)
    assert queue.claim(engine, "three", LEASE) is None
    told = tallies.read(engine)
    assert (told["searches_finished", "cancelled"], told["searches_finished", "failed"]) == (1, 1)
    assert told["attempts_failed", ""] == 4


def test_no_count_is_lost_among_many(engine: Engine) -> None:
    def count() -> None:
        for number in range(25):
            with engine.begin() as connection:
                tallies.add(connection, "results_computed", f"kind {number % 2}", 1)

    results([aside(count) for _ in range(4)])
    assert sum(tallies.read(engine).values()) == 100


def test_searches_by_state_and_the_age_of_the_queue(engine: Engine) -> None:
    assert count_by_state(engine) == {}
    assert oldest_queued_seconds(engine) == 0
    for _ in range(3):
        create_search(engine, request_for())
    taken(engine)
    assert count_by_state(engine) == {"queued": 2, "running": 1}
    assert 0 < oldest_queued_seconds(engine) < 60
