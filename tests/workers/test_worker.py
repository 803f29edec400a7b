"""What the worker process tells, what it outlives, and how it stops."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import psycopg
import pytest
import torch
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError

from db import queue
from db.events import events_after
from db.results import get_results
from db.searches import Search, create_search, get_search
from db.tables import ResultRow
from db.workers import live_workers
from search.errors import BitfrontierError
from search.request import SearchRequest
from tests.aside import PATIENCE, wait_until
from tests.workers.searching import ask, working
from workers import heartbeat
from workers import worker as module
from workers.fingerprint import ModelChanged
from workers.heartbeat import Held
from workers.pools import Function, InProcessPool, WorkersLost
from workers.run import Run
from workers.stopping import Cancelled, Shutdown
from workers.tasks import Content, Item, Result, Task
from workers.worker import Worker, reason, without_paths

pytestmark = pytest.mark.long

MINUTE = timedelta(minutes=1)


def posted(engine: Engine) -> Search:
    return create_search(engine, SearchRequest.model_validate({"model": "m", "budgets": {"avg_bits": 4}}))[0]


def lost(sqlstate: str | None = None) -> OperationalError:
    """As the driver tells that the server is gone, or, with a state, what it said."""
    error = psycopg.OperationalError("the connection is lost")
    error.sqlstate = sqlstate
    return OperationalError("UPDATE", {}, error)


@pytest.fixture(autouse=True)
def _inprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFRONTIER_POOL", "inprocess")
    monkeypatch.setattr(module, "POLL_SECONDS", 0.1)


Work = Callable[..., None]


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], list[queue.Claim]]:
    """Puts a function in the place of the pipeline; the claims that it is called with."""

    def put(work: Work) -> list[queue.Claim]:
        claims: list[queue.Claim] = []

        def run_search(engine: Engine, claim: queue.Claim, *others: Any) -> None:
            claims.append(claim)
            work(engine, claim, *others)

        monkeypatch.setattr(module, "run_search", run_search)
        return claims

    return put


def succeed(engine: Engine, claim: queue.Claim, *_others: object) -> None:
    queue.succeed(engine, claim, {})


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("cannot identify image file '/srv/data/sets/imgs/a.png'", "cannot identify image file 'a.png'"),
        ("the file /srv/models/m/config.json is not JSON", "the file config.json is not JSON"),
        ("accepted: org/name, 3/4 and w4a16/w8a16", "accepted: org/name, 3/4 and w4a16/w8a16"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
    ],
)
def test_a_problem_names_files_but_not_where_they_are(told: str, kept: str) -> None:
    assert without_paths({"detail": told, "status": 422}) == {"detail": kept, "status": 422}


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_that_memory_ran_out_is_told_in_words(error: Exception) -> None:
    assert "ran out of memory" in reason(error)


def test_anything_unexpected_is_told_by_its_first_line() -> None:
    assert "ValueError: one" in reason(ValueError("one\ntwo"))
    assert "two" not in reason(ValueError("one\ntwo"))


class TestTheClaim:
    def test_whoever_slept_through_the_lease_writes_nothing_and_goes_on(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]]
    ) -> None:
        search, worker = posted(engine), Worker(engine)

        def overslept(engine: Engine, claim: queue.Claim, *_others: object) -> None:
            # Another worker took the search and this one does not know.
            queue.heartbeat(engine, claim, timedelta(0))
            assert queue.claim(engine, "another", MINUTE)
            worker.stop()
            raise Cancelled

        doing(overslept)
        worker.run()
        found = get_search(engine, search.id)
        assert (found.state, found.owner, found.attempt) == ("running", "another", 2)

    def test_whoever_was_stalled_past_the_lease_asks_before_anything_else(self, engine: Engine) -> None:
        posted(engine)
        claim = queue.claim(engine, "stalled", timedelta(seconds=0.05))
        assert claim is not None
        held = Held(engine, claim, timedelta(seconds=0.05))
        held.check()
        time.sleep(0.1)
        assert queue.claim(engine, "another", MINUTE)
        with pytest.raises(queue.LeaseLost):
            held.check()

    def test_whoever_was_stalled_and_holds_it_still_goes_on(self, engine: Engine) -> None:
        posted(engine)
        claim = queue.claim(engine, "stalled", timedelta(seconds=0.05))
        assert claim is not None
        held = Held(engine, claim, timedelta(seconds=5))
        held._renewed -= 10
        held.check()
        assert queue.claim(engine, "another", MINUTE) is None, "the lease is renewed"

    def test_a_lease_is_renewed_in_the_background(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(heartbeat, "RENEW_SECONDS", 0.1)
        search = posted(engine)
        leases = set[object]()

        def renewed() -> bool:
            leases.add(get_search(engine, search.id).lease_until)
            return len(leases) > 3

        def long(engine: Engine, claim: queue.Claim, *_others: object) -> None:
            wait_until(renewed)
            succeed(engine, claim)

        doing(long)
        with working(Worker(engine)):
            wait_until(lambda: get_search(engine, search.id).state == "succeeded")
        assert max(leases) > min(leases) + timedelta(seconds=0.2)

    def test_one_whose_answer_was_lost_is_worked_on(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        search, claim, answers = posted(engine), queue.claim, []

        def claim_without_answer(*arguments: Any) -> queue.Claim | None:
            answers.append(claim(*arguments))
            if len(answers) == 1:
                raise lost()
            return answers[-1]

        monkeypatch.setattr(queue, "claim", claim_without_answer)
        claims = doing(succeed)
        with working(Worker(engine)):
            wait_until(lambda: get_search(engine, search.id).state == "succeeded")
        assert claims == answers[:1]
        assert get_search(engine, search.id).attempt == 1


class TestADatabaseThatStaysAway:
    def test_the_search_is_handed_back_and_no_attempt_is_lost(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]]
    ) -> None:
        search = posted(engine)

        def cut_off(engine: Engine, claim: queue.Claim, *_others: object) -> None:
            if claim.attempt == 1:
                raise lost()
            succeed(engine, claim)

        doing(cut_off)
        with working(Worker(engine)):
            wait_until(lambda: get_search(engine, search.id).state == "succeeded")
        found = get_search(engine, search.id)
        assert (found.attempt, found.max_attempts, found.error) == (2, search.max_attempts + 1, None)
        states = [event.data["state"] for event in events_after(engine, search.id, 0)]
        assert states == ["queued", "running", "queued", "running", "succeeded"]

    def test_of_a_full_disk_the_reason_is_told_in_the_end(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]]
    ) -> None:
        search = posted(engine)

        def full(*_arguments: object) -> None:
            raise lost("53100")

        claims = doing(full)
        with working(Worker(engine)):
            wait_until(lambda: get_search(engine, search.id).state == "failed")
        assert len(claims) == search.max_attempts
        error = get_search(engine, search.id).error
        assert error is not None
        assert "disk of the database is full" in error["detail"]


class TestASickWorker:
    """What goes wrong unexpectedly may be its own fault."""

    @pytest.mark.parametrize("error", [ValueError("odd"), WorkersLost("they died")])
    def test_rests_longer_each_time_and_leaves_the_queue_to_others(
        self,
        engine: Engine,
        doing: Callable[[Work], list[queue.Claim]],
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
    ) -> None:
        monkeypatch.setattr(module, "FIRST_REST", 0.1)
        monkeypatch.setattr(module, "LONGEST_REST", 0.4)
        searches, worker = [posted(engine) for _ in range(7)], Worker(engine)
        times, rests = list[float](), list[float]()

        def fail(engine: Engine, claim: queue.Claim, *_others: object) -> None:
            times.append(time.monotonic())
            rests.append(worker._rest)
            if claim.search_id == searches[4].id:
                succeed(engine, claim)
            else:
                raise error

        monkeypatch.setattr(queue, "release", lambda engine, claim, problem: queue.fail(engine, claim, problem))
        doing(fail)
        with working(worker):
            wait_until(lambda: get_search(engine, searches[-1].id).state == "failed")
        assert rests == [0, 0.1, 0.2, 0.4, 0.4, 0, 0.1]
        assert all(later - earlier >= rest for (earlier, later), rest in zip(pairwise(times), rests[1:], strict=True))

    def test_rests_no_longer_than_it_is_asked_to_work(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "FIRST_REST", 3600.0)
        posted(engine)

        def fail(*_arguments: object) -> None:
            raise ValueError("odd")

        claims = doing(fail)
        with working(Worker(engine)):
            wait_until(lambda: claims)
        assert len(claims) == 1

    def test_forgets_the_evaluators_of_which_some_have_other_files(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        search, closed = posted(engine), threading.Event()

        class Mixed(InProcessPool):
            def close(self) -> None:
                closed.set()

        monkeypatch.setattr(module, "open_pool", Mixed)

        def refuse(_engine: Engine, _claim: queue.Claim, pool_for: Callable[[Any], object], *_: object) -> None:
            pool_for("spec")
            raise ModelChanged("the files of 'm' changed", field="model")

        doing(refuse)
        with working(Worker(engine)):
            wait_until(lambda: get_search(engine, search.id).state == "failed")
            assert closed.wait(PATIENCE)
        error = get_search(engine, search.id).error
        assert error is not None
        assert error["type"].endswith("model-changed")


class TestStopping:
    def test_a_cancel_is_heard_whatever_the_worker_waits_for(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BITFRONTIER_LEASE_SECONDS", "3600")
        monkeypatch.setattr(heartbeat, "RENEW_SECONDS", 3600.0)  # Else it would ask by itself.
        search = posted(engine)

        def wait_long(engine: Engine, claim: queue.Claim, _pool: object, check: Callable[[], None], *_: object) -> None:
            while True:
                check()
                time.sleep(0.05)

        doing(wait_long)
        with working(Worker(engine)):
            wait_until(lambda: get_search(engine, search.id).state == "running")
            queue.cancel(engine, search.id)
            wait_until(lambda: get_search(engine, search.id).state == "cancelled")

    def test_a_long_computation_of_the_worker_itself_is_left_behind_and_not_joined(self, engine: Engine) -> None:
        run, begun, over, done = bare_run(engine), *(threading.Event() for _ in range(3))

        def solve() -> None:
            begun.set()
            over.wait(PATIENCE)
            done.set()

        def check() -> None:
            if begun.is_set():
                raise Cancelled

        run.check = check
        with pytest.raises(Cancelled):
            run.aside(solve)
        assert not done.is_set()
        threading.Timer(0.3, over.set).start()
        assert bare_run(engine).aside(done.is_set), "the next search waited for it"

    def test_what_is_under_way_is_finished_and_kept_and_the_attempt_is_not_counted(
        self, digits: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        search, worker = ask(digits), Worker(digits)
        kept: list[Result] = []

        class Stopped(InProcessPool):
            """Is asked to stop while it is at its second item."""

            def map(self, function: Function, items: Sequence[Item], **stopping: Any) -> Iterator[tuple[int, Result]]:
                def call(evaluator: Any, item: Item) -> Result:
                    if len(kept) == 1:
                        worker.stop()
                    kept.append(function(evaluator, item))
                    return kept[-1]

                yield from super().map(call, items, **stopping)

        monkeypatch.setattr(module, "open_pool", Stopped)
        worker.run()
        found = get_search(digits, search.id)
        assert (found.state, found.attempt, found.max_attempts) == ("queued", 1, search.max_attempts + 1)
        with digits.connect() as connection:
            assert len(connection.execute(select(ResultRow.key)).all()) == len(kept) == 2
        assert live_workers(digits, MINUTE) == [], "it has signed out"

    def test_after_the_grace_period_nothing_is_waited_for(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BITFRONTIER_GRACE_SECONDS", "0.3")
        search, worker = posted(engine), Worker(engine)

        def endless(engine: Engine, claim: queue.Claim, _pool: object, check: Callable[[], None], *_: object) -> None:
            worker.stop()
            while True:
                check()
                time.sleep(0.05)

        doing(endless)
        began = time.monotonic()
        worker.run()
        assert time.monotonic() - began > 0.3
        assert get_search(engine, search.id).state == "queued"

    def test_a_second_signal_ends_at_once_what_asks_nobody(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]]
    ) -> None:
        search, worker = posted(engine), Worker(engine)

        def deaf(*_arguments: object) -> None:
            worker.stop()
            worker.interrupt()  # As a signal's handler does, in the middle of anything.
            pytest.fail("it went on")

        doing(deaf)
        worker.run()
        assert get_search(engine, search.id).state == "queued"


class TestBetweenSearches:
    def test_a_worker_signs_in_tells_of_its_evaluators_and_lets_them_go(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BITFRONTIER_IDLE_SECONDS", "0.2")
        monkeypatch.setattr("workers.heartbeat.SEEN_SECONDS", 0.05)
        search, worker, told, closed = posted(engine), Worker(engine), threading.Event(), threading.Event()

        class Ready(InProcessPool):
            held = 3  # type: ignore[assignment]

            def close(self) -> None:
                closed.set()

        monkeypatch.setattr(module, "open_pool", Ready)

        def use(engine: Engine, claim: queue.Claim, pool_for: Callable[[Any], object], *_: object) -> None:
            pool_for("spec")
            assert told.wait(PATIENCE)
            succeed(engine, claim)

        doing(use)
        with working(worker):
            wait_until(lambda: [one.evaluators for one in live_workers(engine, MINUTE)] == [3])
            (known,) = live_workers(engine, MINUTE)
            assert known.owner == worker.owner
            told.set()
            assert closed.wait(PATIENCE)
            wait_until(lambda: [one.evaluators for one in live_workers(engine, MINUTE)] == [0])
        assert get_search(engine, search.id).state == "succeeded"
        assert live_workers(engine, MINUTE) == []

    def test_an_idle_worker_begins_at_once(
        self, engine: Engine, doing: Callable[[Work], list[queue.Claim]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "POLL_SECONDS", 3600.0)
        worker, begun = Worker(engine), threading.Event()

        def begin(engine: Engine, claim: queue.Claim, *_others: object) -> None:
            begun.set()
            succeed(engine, claim)

        doing(begin)
        with working(worker):
            wait_until(lambda: live_workers(engine, MINUTE))
            time.sleep(0.2)
            posted(engine)
            assert begun.wait(PATIENCE), "it was woken"

    def test_two_lives_of_a_process_id_are_two_owners(self, engine: Engine) -> None:
        assert Worker(engine).owner != Worker(engine).owner


def bare_run(engine: Engine) -> Run:
    """Of a claimed search, with nothing done."""
    posted(engine)
    claim = queue.claim(engine, "test", MINUTE)
    assert claim is not None
    request = SearchRequest.model_validate({"model": "m", "budgets": {"avg_bits": 4}})
    run = Run(engine, claim, request, lambda: None, lambda: True, {})
    run.content = Content("model", "data", "rtn")
    return run


def square(_evaluator: object, item: Item) -> Result:
    return {"square": item["value"] ** 2}


class TestResults:
    """What a run computes, counts and stores."""

    TASK = Task("square", 1, square)

    class Pool(InProcessPool):
        def __init__(self, broken: int | None = None) -> None:
            self.computed, self.broken = [0] * 0, broken

        def map(self, function: Function, items: Sequence[Item], **stopping: Any) -> Iterator[tuple[int, Result]]:
            for index, item in reversed(list(enumerate(items))):
                if not stopping["more"]():
                    return
                if item["value"] == self.broken:
                    raise BitfrontierError("broken")
                self.computed.append(item["value"])
                yield index, square(None, item)

    ITEMS = tuple({"value": value} for value in range(5))

    def compute(self, run: Run, pool: Pool) -> list[Result]:
        run.pool = pool
        return run.compute(self.TASK, self.ITEMS, "measure")

    def test_each_is_stored_when_it_is_there_and_is_this_searchs_own_in_a_later_attempt(self, engine: Engine) -> None:
        run = bare_run(engine)
        with pytest.raises(BitfrontierError, match="broken"):
            self.compute(run, broken := self.Pool(broken=2))
        assert broken.computed == [4, 3]
        queue.release(engine, run.claim)
        claim = queue.claim(engine, "next", MINUTE)
        assert claim is not None
        again = Run(engine, claim, run.request, lambda: None, lambda: True, {})
        again.content = run.content
        assert self.compute(again, pool := self.Pool()) == [{"square": value**2} for value in range(5)]
        assert pool.computed == [2, 1, 0]
        assert again.counts.summary() == {"computed": 5, "reused": 0, "reused_from": []}

    def test_those_of_another_search_are_reused_and_it_is_named(self, engine: Engine) -> None:
        first, second = bare_run(engine), bare_run(engine)
        self.compute(first, self.Pool())
        self.compute(second, pool := self.Pool())
        self.compute(second, pool)
        assert pool.computed == []
        assert second.counts.summary() == {"computed": 0, "reused": 5, "reused_from": [first.claim.search_id]}
        assert second.counts.reused_lately() == {"square": 5}
        assert second.counts.reused_lately() == {}

    def test_of_two_that_compute_the_same_both_go_on_with_the_first(self, engine: Engine) -> None:
        first, second = bare_run(engine), bare_run(engine)
        assert first.keep("k", "square", {"loss": 0.5}, 1.0) == {"loss": 0.5}
        assert second.keep("k", "square", {"loss": 0.7}, 1.0) == {"loss": 0.5}
        assert second.counts.summary()["reused"] == 1

    def test_a_new_one_is_given_as_it_will_be_found(self, engine: Engine) -> None:
        kept = bare_run(engine).keep("k", "square", {"long name": (1.0, 2), "b": 1e22, "a": {2: None}}, 1.0)
        assert list(kept) == ["a", "b", "long name"]
        assert kept == get_results(engine, ["k"])["k"].value
        assert kept["long name"] == [1.0, 2]

    def test_a_worker_that_stops_keeps_what_it_has(self, engine: Engine) -> None:
        run = bare_run(engine)
        pool = self.Pool()
        run.more = lambda: len(pool.computed) < 2
        with pytest.raises(Shutdown):
            self.compute(run, pool)
        with engine.connect() as connection:
            assert len(connection.execute(select(ResultRow.key)).all()) == 2

    def test_a_write_goes_on_trying_while_the_database_is_away(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, tries = bare_run(engine), []

        def away_at_first() -> int:
            tries.append(1)
            if len(tries) < 3:
                raise lost(None if len(tries) == 1 else "53100")
            return 7

        assert run.insist(away_at_first) == 7
        assert len(tries) == 3


class TestEvents:
    def test_stages_are_told_with_their_attempt_and_tallied_once(self, engine: Engine) -> None:
        run = bare_run(engine)
        run.enter("sensitivity", 2, {"metric": "kl"})
        run.progress("sensitivity", 1, 2)
        run.progress("sensitivity", 1, 2)
        run.enter("sensitivity", 2, {"metric": "pqi"})
        run.leave()
        told = [(event.kind, event.data) for event in events_after(engine, run.claim.search_id, 0)]
        stages = [data for kind, data in told if kind == "stage"]
        assert [(one["metric"], one["attempt"]) for one in stages] == [("kl", 1), ("pqi", 1)]
        assert [kind for kind, _ in told].count("stage_end") == 2
        assert [data["done"] for kind, data in told if kind == "progress"] == [0, 1, 0]
        assert run.summary["stage_seconds"]["sensitivity"] > 0

    def test_a_notice_is_given_once(self, engine: Engine) -> None:
        run = bare_run(engine)
        for message in ("one", "two", "one"):
            run.notice(message)
        events = events_after(engine, run.claim.search_id, 0)
        assert [event.data["message"] for event in events if event.kind == "notice"] == ["one", "two"]

    def test_nothing_is_told_of_a_search_that_is_another_workers(self, engine: Engine) -> None:
        run = bare_run(engine)
        queue.release(engine, run.claim)
        before = events_after(engine, run.claim.search_id, 0)
        writes: list[Callable[[], object]] = [
            lambda: run.enter("measure", 3),
            lambda: run.notice("late"),
            lambda: run.progress("measure", 1, 3),
            run.save,
            run.succeed,
        ]
        for write in writes:
            with pytest.raises(queue.LeaseLost):
                write()
        assert events_after(engine, run.claim.search_id, 0) == before
