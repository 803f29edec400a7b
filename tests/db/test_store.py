from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from db import queue
from db.candidates import candidates, put_candidates
from db.errors import IdempotencyMismatch
from db.events import add_event, events_after, wait_for_event
from db.models import get_model, list_models, put_model
from db.queue import Claim, LeaseLost
from db.results import get_results, put_result
from db.searches import Search, create_search, get_search, list_searches, set_summary
from search.candidate import Candidate
from search.errors import NotFound
from search.inventory import Inventory, Layer
from search.request import SearchRequest
from tests.db.conftest import request_for

LEASE = timedelta(seconds=30)


class TestSearches:
    def test_a_new_search_is_queued_with_its_request(self, engine: Engine) -> None:
        request = request_for("org/name", 5.25)
        search, created = create_search(engine, request)
        assert created
        assert (search.state, search.model, search.target, search.attempt) == ("queued", "org/name", "generic", 0)
        assert SearchRequest.model_validate(search.request) == request
        assert get_search(engine, search.id) == search
        assert [(event.kind, event.data) for event in events_after(engine, search.id, 0)] == [
            ("state", {"state": "queued"})
        ]

    def test_without_a_key_every_request_is_a_search(self, engine: Engine) -> None:
        first, second = (create_search(engine, request_for())[0] for _ in range(2))
        assert first.id != second.id

    def test_a_key_gives_the_same_search_again(self, engine: Engine) -> None:
        first, created = create_search(engine, request_for(), idempotency_key="k")
        again, created_again = create_search(engine, request_for(), idempotency_key="k")
        assert (created, created_again) == (True, False)
        assert again == first
        assert len(events_after(engine, first.id, 0)) == 1

    def test_a_key_with_another_request_is_refused(self, engine: Engine) -> None:
        create_search(engine, request_for(avg_bits=4.25), idempotency_key="k")
        with pytest.raises(IdempotencyMismatch) as refusal:
            create_search(engine, request_for(avg_bits=4.5), idempotency_key="k")
        assert refusal.value.problem()["status"] == 422
        assert len(list_searches(engine, limit=10)) == 1

    def test_a_key_used_by_many_at_once_gives_one_search(self, engine: Engine) -> None:
        made: list[tuple[Search, bool]] = []
        threads = [
            threading.Thread(target=lambda: made.append(create_search(engine, request_for(), idempotency_key="k")))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({search.id for search, _ in made}) == 1
        assert sum(created for _, created in made) == 1

    def test_pages_follow_one_another(self, engine: Engine) -> None:
        ids = [create_search(engine, request_for())[0].id for _ in range(7)]
        seen: list[int] = []
        before = None
        while page := list_searches(engine, limit=3, before=before):
            seen += [search.id for search in page]
            before = seen[-1]
            create_search(engine, request_for())  # what arrives meanwhile shifts no page
        assert seen == ids[::-1]

    def test_pages_of_one_state_and_model(self, engine: Engine) -> None:
        a = create_search(engine, request_for("a"))[0].id
        b = create_search(engine, request_for("b"))[0].id
        queue.cancel(engine, a)
        assert [search.id for search in list_searches(engine, limit=9, model="a")] == [a]
        assert [search.id for search in list_searches(engine, limit=9, state="queued")] == [b]
        assert list_searches(engine, limit=9, state="queued", model="a") == []

    def test_an_unknown_search_is_not_found(self, engine: Engine) -> None:
        with pytest.raises(NotFound, match="17"):
            get_search(engine, 17)

    def test_a_summary_is_replaced(self, engine: Engine, queued: Search) -> None:
        claim = queue.claim(engine, "me", LEASE)
        assert claim is not None
        set_summary(engine, claim, {"a": 1})
        set_summary(engine, claim, {"b": None})
        assert get_search(engine, queued.id).summary == {"b": None}

    @pytest.mark.parametrize("column", ["state", "stage"])
    def test_unknown_words_are_refused_by_the_table(self, engine: Engine, queued: Search, column: str) -> None:
        with pytest.raises(IntegrityError, match=f"searches_{column}_check"), engine.begin() as connection:
            connection.execute(text(f"UPDATE searches SET {column} = 'asleep'"))


class TestEvents:
    def test_reading_resumes_after_an_id(self, engine: Engine, queued: Search) -> None:
        other = create_search(engine, request_for())[0]
        for number in range(5):
            add_event(engine, queued.id, "notice", {"message": number})
            add_event(engine, other.id, "notice", {"message": -1})
        first = events_after(engine, queued.id, 0, limit=3)
        rest = events_after(engine, queued.id, first[-1].id)
        assert [event.data.get("message") for event in first + rest] == [None, 0, 1, 2, 3, 4]
        assert events_after(engine, queued.id, rest[-1].id) == []

    def test_ids_become_visible_in_order(self, engine: Engine, queued: Search) -> None:
        seen: list[int] = []
        writers = [
            threading.Thread(target=lambda: [add_event(engine, queued.id, "notice", {}) for _ in range(25)])
            for _ in range(4)
        ]
        for writer in writers:
            writer.start()
        while len(seen) < 101:
            seen += [event.id for event in events_after(engine, queued.id, seen[-1] if seen else 0)]
            assert seen or all(writer.is_alive() for writer in writers)
            time.sleep(0.001)
            if not any(writer.is_alive() for writer in writers):
                seen += [event.id for event in events_after(engine, queued.id, seen[-1])]
                break
        for writer in writers:
            writer.join()
        assert seen == [event.id for event in events_after(engine, queued.id, 0)]
        assert len(seen) == 101

    def test_no_event_without_a_search(self, engine: Engine) -> None:
        with pytest.raises(NotFound):
            add_event(engine, 17, "notice", {})

    def test_waiting_ends_at_an_event_of_this_search_only(self, engine: Engine, queued: Search) -> None:
        other = create_search(engine, request_for())[0]
        timers = [
            threading.Timer(0.2, add_event, (engine, other.id, "notice", {})),
            threading.Timer(0.8, add_event, (engine, queued.id, "notice", {})),
        ]
        begun = time.monotonic()
        for timer in timers:
            timer.start()
        wait_for_event(engine, queued.id, 20)
        assert 0.7 < time.monotonic() - begun < 5
        for timer in timers:
            timer.join()

    def test_waiting_ends_at_once_for_an_event_that_came_before(self, engine: Engine, queued: Search) -> None:
        last = events_after(engine, queued.id, 0)[-1].id
        add_event(engine, queued.id, "notice", {})
        begun = time.monotonic()
        wait_for_event(engine, queued.id, 20, after=last)
        assert time.monotonic() - begun < 5

    def test_waiting_ends_at_the_timeout(self, engine: Engine, queued: Search) -> None:
        begun = time.monotonic()
        wait_for_event(engine, queued.id, 0.3, after=events_after(engine, queued.id, 0)[-1].id)
        assert 0.25 < time.monotonic() - begun < 2


class TestResults:
    def test_the_first_value_stays(self, engine: Engine) -> None:
        put_result(engine, "k", "measurement", {"loss": 0.5}, 1.5)
        put_result(engine, "k", "measurement", {"loss": 0.7}, 2.5)
        assert get_results(engine, ["k", "missing"]) == {"k": {"loss": 0.5}}

    def test_many_keys_and_none(self, engine: Engine) -> None:
        for number in range(3):
            put_result(engine, f"k{number}", "probe", number, 0.0)
        assert get_results(engine, [f"k{number}" for number in range(70_000)]) == {"k0": 0, "k1": 1, "k2": 2}
        assert get_results(engine, []) == {}

    def test_floats_come_back_to_the_bit(self, engine: Engine) -> None:
        values = [0.1, 1e-300, 123456789012345.6, 2.0**-1074, 1 / 3]
        put_result(engine, "k", "sensitivity", {"values": [values, [None]]}, 0.0)
        assert get_results(engine, ["k"])["k"] == {"values": [values, [None]]}

    def test_nan_is_refused(self, engine: Engine) -> None:
        with pytest.raises(ValueError, match="neither NaN nor Infinity"):
            put_result(engine, "k", "probe", {"values": [math.nan]}, 0.0)
        assert get_results(engine, ["k"]) == {}


class TestCandidates:
    FIRST = Candidate(
        number=0,
        source="uniform",
        label="w4a16g64",
        allocation={"a": "w4a16g64"},
        predicted={"kl": 0.25},
        costs={"avg_bits": 4.25},
    )
    SECOND = replace(FIRST, number=1, source="ilp", metrics={"loss": 0.125}, fits=True, on_frontier=True)

    @pytest.fixture
    def claim(self, engine: Engine, queued: Search) -> Claim:
        claim = queue.claim(engine, "me", LEASE)
        assert claim is not None
        return claim

    def test_they_come_back_by_number(self, engine: Engine, claim: Claim) -> None:
        put_candidates(engine, claim, [self.SECOND, self.FIRST])
        assert candidates(engine, claim.search_id) == [self.FIRST, self.SECOND]

    def test_putting_them_again_changes_adds_and_deletes(self, engine: Engine, claim: Claim) -> None:
        put_candidates(engine, claim, [self.FIRST, self.SECOND])
        changed = replace(self.SECOND, metrics={"loss": 0.5}, on_frontier=False)
        third = replace(self.FIRST, number=2)
        put_candidates(engine, claim, [changed, third])
        assert candidates(engine, claim.search_id) == [changed, third]
        put_candidates(engine, claim, [])
        assert candidates(engine, claim.search_id) == []

    def test_other_searches_keep_theirs(self, engine: Engine, claim: Claim) -> None:
        create_search(engine, request_for())
        other = queue.claim(engine, "me", LEASE)
        assert other is not None
        put_candidates(engine, claim, [self.FIRST])
        put_candidates(engine, other, [self.SECOND])
        assert candidates(engine, claim.search_id) == [self.FIRST]

    def test_a_stale_worker_changes_none(self, engine: Engine, claim: Claim) -> None:
        put_candidates(engine, claim, [self.FIRST])
        queue.release(engine, claim)
        with pytest.raises(LeaseLost):
            put_candidates(engine, claim, [])
        assert candidates(engine, claim.search_id) == [self.FIRST]


class TestModels:
    INVENTORY = Inventory("d", "BertModel", "embedding", 10, (Layer("a", "linear", 2, 5, 10, "b", ("c",)),))

    def test_a_model_comes_back(self, engine: Engine) -> None:
        put_model(engine, "b", "folder", self.INVENTORY)
        put_model(engine, "a", "org/name", None)
        assert [(model.name, model.source, model.inventory) for model in list_models(engine)] == [
            ("a", "org/name", None),
            ("b", "folder", self.INVENTORY),
        ]
        assert get_model(engine, "c") is None

    def test_registering_again_replaces(self, engine: Engine) -> None:
        put_model(engine, "a", "old", None)
        before = get_model(engine, "a")
        put_model(engine, "a", "new", self.INVENTORY)
        after = get_model(engine, "a")
        assert before is not None
        assert after is not None
        assert (after.source, after.inventory, after.created_at) == ("new", self.INVENTORY, before.created_at)
