"""Insisting on writes while connections are ended, and while Postgres is killed and comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from db import embedded, queue, tallies
from db.engine import connect, migrate
from db.errors import DatabaseUnavailable
from db.events import end_stage, events_after, tell
from db.notify import EVENTS, Listener
from db.queue import Claim
from db.results import get_results, put_result
from db.retry import PASSING, insist, is_passing
from db.searches import create_search
from tests.aside import PATIENCE, aside, results
from tests.db.conftest import postmaster, request_for, taken

STEPS = 20


def work(engine: Engine, claim: Claim, steps: range) -> None:
    """What a worker writes, each write insisted upon."""
    for step in steps:
        key = f"{claim.search_id} {step}"
        for write in (
            partial(put_result, engine, key, "probe", step, 0.1, claim.search_id),
            partial(tell, engine, claim, "measured", {"number": step}, f"measured:{step}"),
            partial(queue.progress, engine, claim, "measure", step, STEPS),
        ):
            insist(write, seconds=PATIENCE)
    insist(lambda: end_stage(engine, claim, "measure", 1.0, {"probe": 2}, "end"), seconds=PATIENCE)


def check_all_is_there_once(engine: Engine, *claims: Claim) -> None:
    for claim in claims:
        told = events_after(engine, claim.search_id, 0)
        for kind, word in (("measured", "number"), ("progress", "done")):
            assert [event.data[word] for event in told if event.kind == kind] == [*range(STEPS)]
        stored = get_results(engine, [f"{claim.search_id} {step}" for step in range(STEPS)])
        assert sorted(one.value for one in stored.values()) == [*range(STEPS)]
    assert tallies.read(engine) == {
        ("results_computed", "probe"): STEPS * len(claims),
        ("results_reused", "probe"): 2 * len(claims),
        ("stage_count", "measure"): len(claims),
        ("stage_seconds", "measure"): float(len(claims)),
    }


def test_nothing_is_lost_or_doubled_while_connections_are_ended(engine: Engine, postgres_url: str) -> None:
    for _ in range(3):
        create_search(engine, request_for())
    claims = [taken(engine, f"worker {number}") for number in range(3)]
    victim = connect(postgres_url, application_name="victim")
    victims = "FROM pg_stat_activity WHERE application_name = 'victim'"
    ended, pause = 0, 0.1
    working = [aside(work, victim, claim, range(STEPS)) for claim in claims]
    while not all(one.done() for one in working):
        with engine.begin() as connection:
            ended += len(connection.execute(text(f"SELECT pg_terminate_backend(pid) {victims}")).all())
        wait(working, pause)
        pause *= 1.05  # A slow machine writes between two, in the end.
    results(working)
    assert ended > 5
    check_all_is_there_once(engine, *claims)
    victim.dispose()


def test_nothing_is_lost_or_doubled_when_postgres_is_killed(monkeypatch: pytest.MonkeyPatch, data_folder: Path) -> None:
    monkeypatch.delenv("BITFRONTIER_DATABASE_URL", raising=False)
    monkeypatch.setenv("BITFRONTIER_DATA", str(data_folder))
    engine = connect()
    migrate(engine)
    create_search(engine, request_for())
    claim = taken(engine)
    with Listener(engine, EVENTS) as listener:
        working = aside(work, engine, claim, range(STEPS))
        assert listener.wait(PATIENCE) == {claim.search_id}
    os.kill(postmaster(data_folder / "postgres"), signal.SIGKILL)
    working.result(2 * PATIENCE)
    check_all_is_there_once(engine, claim)
    engine.dispose()
    embedded.leave(data_folder / "postgres")


class Failing:
    """Raises what it was given, one after the other, and then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


AWAY = DatabaseUnavailable("away")


def raised(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def raise_in_postgres(engine: Engine, code: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'simulated' USING ERRCODE = '{code}'; END $$"))


@pytest.mark.parametrize("code", [*sorted(PASSING), "08006"])
def test_what_passes_is_waited_for(engine: Engine, code: str) -> None:
    function = Failing(raised(lambda: raise_in_postgres(engine, code)), AWAY)
    assert insist(function) == "done"
    assert function.calls == 3


@pytest.mark.parametrize("code", ["42P01", "22003", "23514"])
def test_what_does_not_pass_is_raised_at_once(engine: Engine, code: str) -> None:
    function = Failing(raised(lambda: raise_in_postgres(engine, code)))
    with pytest.raises(DBAPIError, match="simulated"):
        insist(function)
    assert function.calls == 1


def test_a_server_that_only_reads_after_a_switch_passes(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("SET default_transaction_read_only = on"))
        connection.commit()
        refused = raised(lambda: connection.execute(text("CREATE TABLE written ()")))
        connection.invalidate()
    assert getattr(refused, "orig", None).sqlstate == "25006"
    assert is_passing(refused)


def test_what_is_connected_to_a_server_that_only_reads_is_used_no_more(postgres_url: str) -> None:
    engine = connect(postgres_url)
    process = text("SELECT pg_backend_pid()")
    with engine.connect() as connection:
        connection.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
        connection.commit()
        old = connection.execute(process).scalar_one()

    def write() -> int:
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE probe ()"))
            connection.execute(text("DROP TABLE probe"))
            return int(connection.execute(process).scalar_one())

    assert insist(write, seconds=10) != old
    engine.dispose()


def test_a_statement_that_an_operator_ended_is_said_again(engine: Engine) -> None:
    with engine.connect() as sleeping, engine.connect() as operator:
        asleep = sleeping.execute(text("SELECT pg_backend_pid()")).scalar_one()
        ended = aside(raised, lambda: sleeping.execute(text("SELECT pg_sleep(600)")))
        while not ended.done():
            operator.execute(text("SELECT pg_cancel_backend(:process)"), {"process": asleep})
            wait([ended], 0.05)
        error = ended.result()
    assert insist(Failing(error)) == "done"


def test_a_result_of_no_search_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(IntegrityError):
        insist(lambda: put_result(engine, "k", "probe", 1, 0.1, 17))


def test_a_server_that_is_not_there_passes() -> None:
    nowhere = create_engine("postgresql+psycopg://127.0.0.1:1/none")
    assert is_passing(raised(lambda: nowhere.connect()))


def test_patience_ends() -> None:
    away, began = Failing(*[AWAY] * 1000), time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        insist(away, seconds=0.5)
    assert 1 < away.calls < 1000
    assert time.monotonic() - began > 0.2


def test_between_tries_the_caller_may_stop() -> None:
    class Stop(Exception):
        pass

    calls = Failing(Stop())
    with pytest.raises(Stop):
        insist(Failing(AWAY, AWAY), check=calls)
    assert calls.calls == 1
