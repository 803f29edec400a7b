"""Who is at work."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Engine, text

from db.workers import Gpu, live_workers, seen, sign_in, sign_out

SOON = timedelta(seconds=30)
GPU: Gpu = {"name": "H", "memory_used_bytes": 2**33, "memory_total_bytes": 2**36, "utilisation": 0.5}


def silent(engine: Engine, owner: str, since: timedelta) -> None:
    with engine.begin() as connection:
        silence = text("UPDATE workers SET seen_at = now() - :since WHERE owner = :owner")
        connection.execute(silence, {"since": since, "owner": owner})


def test_a_worker_is_there_from_sign_in_to_sign_out(engine: Engine) -> None:
    sign_in(engine, "a:1:ff", host="a", pid=1, version="1.0")
    sign_in(engine, "a:2:ff", host="a", pid=2, version="1.0")
    seen(engine, "a:1:ff", 4, [GPU])
    first, second = live_workers(engine, SOON)
    assert (first.host, first.pid, first.version, first.evaluators, first.gpus) == ("a", 1, "1.0", 4, [GPU])
    assert (second.evaluators, second.gpus) == (0, [])
    sign_out(engine, "a:1:ff")
    assert live_workers(engine, SOON) == [second]


def test_a_worker_that_was_killed_is_not_alive_and_is_forgotten_a_day_later(engine: Engine) -> None:
    sign_in(engine, "killed", host="a", pid=1, version="1.0")
    silent(engine, "killed", timedelta(seconds=31))
    assert live_workers(engine, SOON) == []
    sign_in(engine, "next", host="a", pid=2, version="1.0")
    assert [worker.owner for worker in live_workers(engine, timedelta(minutes=1))] == ["killed", "next"]
    silent(engine, "killed", timedelta(hours=25))
    sign_in(engine, "third", host="a", pid=3, version="1.0")
    assert [worker.owner for worker in live_workers(engine, timedelta(weeks=1))] == ["next", "third"]


def test_what_a_forgotten_worker_says_brings_it_back_from_nowhere(engine: Engine) -> None:
    seen(engine, "forgotten", 4, [])
    assert live_workers(engine, SOON) == []
