"""A commit whose answer is lost may be repeated: every write, done again with the same arguments, changes nothing."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError

from db import candidates, events, keys, latency, models, queue, results, searches, tallies, workers
from db.queue import Claim, LeaseLost
from db.retry import insist
from db.tables import Base
from search.candidate import Candidate
from search.errors import Conflict
from tests.db.conftest import LEASE, request_for
from tests.search.profiles import profile_of
from tests.search.spaces import decoder

CANDIDATE = Candidate(0, "uniform", "w4a16g64", {"a": "w4a16g64"}, {"kl": 0.25}, {"avg_bits": 4.25})
PROBLEM = {"type": "urn:bitfrontier:problem:test", "title": "T", "status": 500, "detail": "out of memory"}
PROFILE = profile_of(decoder(), ("w4a16g32", "w8a8"))
OWNER = "host:1:ff"

CLOCKS = {("searches", "lease_until"), ("workers", "seen_at"), ("latency_profiles", "created_at")}
"""What says when something was written last, and says it again."""

ENDS = LeaseLost, Conflict
"""What a repetition may raise: it has happened already."""

Write = Callable[[Engine, Claim], Any]


def taken_or_recovered(engine: Engine, _claim: Claim) -> Claim | None:
    return queue.recover(engine, "another") or queue.claim(engine, "another", LEASE)


WRITES: dict[str, Write] = {
    "claim": taken_or_recovered,
    "heartbeat": lambda engine, claim: queue.heartbeat(engine, claim, LEASE),
    "progress": lambda engine, claim: queue.progress(engine, claim, "measure", 1, 2),
    "succeed": lambda engine, claim: queue.succeed(engine, claim, {"reused": 1}),
    "fail": lambda engine, claim: queue.fail(engine, claim, PROBLEM),
    "cancelled": queue.cancelled,
    "release": lambda engine, claim: queue.release(engine, claim),
    "release with a problem": lambda engine, claim: queue.release(engine, claim, PROBLEM),
    "cancel": lambda engine, claim: queue.cancel(engine, claim.search_id),
    "cancel a queued one": lambda engine, claim: queue.cancel(engine, claim.search_id + 1),
    "tell": lambda engine, claim: events.tell(engine, claim, "notice", {"message": "m"}, "notice"),
    "end_stage": lambda engine, claim: events.end_stage(engine, claim, "measure", 1.5, {"probe": 2}, "end"),
    "put_result": lambda engine, claim: results.put_result(engine, "k", "probe", [1.5], 0.5, claim.search_id),
    "forget_result": lambda engine, _: results.forget_result(engine, "old"),
    "create_search": lambda engine, _: searches.create_search(engine, request_for(), idempotency_key="k"),
    "set_summary": lambda engine, claim: searches.set_summary(engine, claim, {"a": 1}),
    "put_candidates": lambda engine, claim: candidates.put_candidates(engine, claim, [CANDIDATE]),
    "put_candidates that changed": lambda engine, claim: candidates.put_candidates(engine, claim, [CANDIDATE], []),
    "put_model": lambda engine, _: models.put_model(engine, "name", "folder", None),
    "put_profile": lambda engine, _: latency.put_profile(engine, PROFILE),
    "create_key": lambda engine, _: keys.create_key(engine, "eve", ["read"]),
    "revoke_key": lambda engine, _: keys.revoke_key(engine, "ada"),
    "find_key": lambda engine, _: keys.find_key(engine, TOKENS[0]),
    "sign_in": lambda engine, _: workers.sign_in(engine, "host:2:ff", host="host", pid=2, version="1"),
    "seen": lambda engine, _: workers.seen(engine, OWNER, 4, []),
    "sign_out": lambda engine, _: workers.sign_out(engine, OWNER),
}
TOKENS: list[str] = []


@pytest.fixture
def claim(engine: Engine) -> Claim:
    """A claim on one search, with another that waits, a key, a worker, a result: something to change for each write."""
    for _ in range(2):
        searches.create_search(engine, request_for())
    TOKENS[:] = [keys.create_key(engine, "ada", ["read"])[1]]
    workers.sign_in(engine, OWNER, host="host", pid=1, version="1")
    claim = queue.claim(engine, OWNER, LEASE)
    assert claim is not None
    results.put_result(engine, "old", "probe", [2.5], 0.5, claim.search_id)
    return claim


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_whose_answer_was_lost_is_done_once(
    engine: Engine, claim: Claim, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after_first, commit = snapshot(engine), {}, engine.dialect.do_commit

    def lose_the_answer(connection: Any) -> None:
        commit(connection)
        stored = snapshot(engine)
        if stored != before and not after_first:
            after_first.update(stored)
            connection.driver_connection.close()
            raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(engine.dialect, "do_commit", lose_the_answer)
    with contextlib.suppress(*ENDS):
        insist(lambda: write(engine, claim), seconds=10)
    if after_first:
        assert snapshot(engine) == after_first
    else:
        assert write in (WRITES["heartbeat"], WRITES["seen"]), "only clocks moved"


@pytest.mark.parametrize("write", [WRITES[name] for name in WRITES if name != "find_key"])
def test_a_write_that_was_rolled_back_is_done_by_repeating_it(
    engine: Engine, claim: Claim, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, commit, failures = snapshot(engine), engine.dialect.do_commit, [1]

    def fail_first(connection: Any) -> None:
        if failures:
            failures.pop()
            connection.driver_connection.close()
            raise psycopg.OperationalError("the connection is lost")
        commit(connection)

    monkeypatch.setattr(engine.dialect, "do_commit", fail_first)
    with pytest.raises(OperationalError):
        write(engine, claim)
    assert snapshot(engine) == before
    write(engine, claim)
    assert snapshot(engine) != before or write in (WRITES["heartbeat"], WRITES["seen"])


def test_no_write_is_left_out() -> None:
    modules: list[ModuleType] = [candidates, events, keys, latency, models, queue, results, searches, tallies, workers]
    writing = {
        name
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and "engine.begin()" in inspect.getsource(function)
    }
    assert writing == {name for name in WRITES if " " not in name}


def snapshot(engine: Engine) -> dict[str, list[Any]]:
    """All that is stored, without clocks."""
    with engine.connect() as connection:
        return {
            name: connection.execute(
                select(*(column for column in table.columns if (name, column.name) not in CLOCKS)).order_by(
                    *table.primary_key
                )
            ).all()
            for name, table in Base.metadata.tables.items()
        }
