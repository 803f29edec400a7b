from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from sqlalchemy import Engine

from db import queue, tallies
from db.candidates import put_candidates
from db.events import end_stage, events_after, tell
from db.queue import Claim, LeaseLost
from db.searches import Search, create_search, get_search, set_summary
from search.errors import NotFound
from tests.aside import aside, results
from tests.db.conftest import LEASE, request_for, taken

OUT_OF_MEMORY = {"type": "urn:bitfrontier:problem:test", "title": "T", "status": 500, "detail": "out of memory"}

Expire = Callable[[int], None]


def states(engine: Engine, search_id: int) -> list[str]:
    return [event.data["state"] for event in events_after(engine, search_id, 0) if event.kind == "state"]


def drain(engine: Engine, owner: str) -> list[int]:
    mine = []
    while (claim := queue.claim(engine, owner, LEASE)) is not None:
        mine.append(claim.search_id)
        queue.succeed(engine, claim, {})
    return mine


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
    ids = [create_search(engine, request_for(), priority=priority)[0].id for priority in (0, -1, 0, 5)]
    assert [taken(engine).search_id for _ in range(4)] == [ids[3], ids[0], ids[2], ids[1]]


def test_four_threads_lose_and_double_nothing(engine: Engine) -> None:
    ids = [create_search(engine, request_for())[0].id for _ in range(60)]
    finished = results([aside(drain, engine, f"thread {n}") for n in range(4)])
    assert sorted(chain(*finished)) == ids
    assert all(states(engine, search_id) == ["queued", "running", "succeeded"] for search_id in ids)


WRITES: dict[str, Callable[[Engine, Claim], Any]] = {
    "heartbeat": lambda engine, claim: queue.heartbeat(engine, claim, LEASE),
    "progress": lambda engine, claim: queue.progress(engine, claim, "measure", 1, 2),
    "tell": lambda engine, claim: tell(engine, claim, "notice", {}, "once"),
    "end_stage": lambda engine, claim: end_stage(engine, claim, "measure", 1.5, {"probe": 2}, "once"),
    "put_candidates": lambda engine, claim: put_candidates(engine, claim, []),
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


FINAL: dict[str, Callable[[Engine, Claim], Any]] = {name: WRITES[name] for name in ("succeed", "fail", "cancelled")}


@pytest.mark.parametrize("finish", FINAL.values(), ids=FINAL)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_nothing_follows_the_final_state(
    engine: Engine, claim: Claim, finish: Callable[[Engine, Claim], Any], write: Callable[[Engine, Claim], Any]
) -> None:
    finish(engine, claim)
    before = get_search(engine, claim.search_id), events_after(engine, claim.search_id, 0), tallies.read(engine)
    with pytest.raises(LeaseLost):
        write(engine, claim)
    queue.cancel(engine, claim.search_id)
    assert queue.claim(engine, "two", LEASE) is None
    assert before == (
        get_search(engine, claim.search_id),
        events_after(engine, claim.search_id, 0),
        tallies.read(engine),
    )
    assert before[1][-1].data == {"state": before[0].state}


class TestRecover:
    def test_a_claim_whose_answer_was_lost_is_found_by_its_owner(self, engine: Engine, claim: Claim) -> None:
        assert queue.recover(engine, claim.owner) == claim
        assert queue.recover(engine, "two") is None

    def test_a_claim_whose_lease_ran_out_is_still_his_until_it_is_taken(
        self, engine: Engine, claim: Claim, expire: Expire
    ) -> None:
        expire(claim.search_id)
        assert queue.recover(engine, claim.owner) == claim
        taken(engine, "two")
        assert queue.recover(engine, claim.owner) is None

    @pytest.mark.parametrize("end", ["succeed", "fail", "cancelled", "release"])
    def test_what_has_ended_is_nobodys(self, engine: Engine, claim: Claim, end: str) -> None:
        WRITES[end](engine, claim)
        assert queue.recover(engine, claim.owner) is None


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


def test_progress_that_was_said_last_is_not_said_again(engine: Engine, claim: Claim) -> None:
    for done in (0, 1, 1, 0, 1):
        queue.progress(engine, claim, "measure", done, 1)
    told = [event.data["done"] for event in events_after(engine, claim.search_id, 0) if event.kind == "progress"]
    assert told == [0, 1, 0, 1]


def test_a_new_attempt_says_its_progress_from_the_start(engine: Engine, claim: Claim) -> None:
    queue.progress(engine, claim, "profile", 0, 1)
    queue.release(engine, claim)
    queue.progress(engine, taken(engine), "profile", 0, 1)
    assert [event.kind for event in events_after(engine, claim.search_id, 0)].count("progress") == 2


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
