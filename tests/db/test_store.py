from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from db import queue
from db.candidates import Group, allocations, best_and_uniform, candidate, candidates, put_candidates
from db.errors import IdempotencyMismatch
from db.events import events_after, tell
from db.models import get_model, list_models, put_model
from db.queue import Claim, LeaseLost
from db.results import Stored, get_results, put_result
from db.searches import Search, create_search, get_search, list_searches, set_summary
from search.candidate import Candidate
from search.errors import NotFound
from search.inventory import Inventory, Layer
from search.request import SearchRequest
from tests.aside import aside, results
from tests.db.conftest import LEASE, request_for, taken


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

    def test_a_list_has_of_requests_and_summaries_what_it_shows(self, engine: Engine, queued: Search) -> None:
        (listed,) = list_searches(engine, limit=9)
        assert listed.summary is None
        assert listed.request == {"budgets": queued.request["budgets"], "optimizer": {"objective": "loss"}}
        claim = queue.claim(engine, "me", LEASE)
        assert claim is not None
        told = {"computed": 3, "reused": 4, "reused_from": [1], "axes": ["size_bytes"]}
        set_summary(engine, claim, told | {"units": [{"name": "a"}]})
        (listed,) = list_searches(engine, limit=9)
        assert listed == replace(get_search(engine, queued.id), request=listed.request, summary=told)

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
    @pytest.fixture
    def other(self, engine: Engine, claim: Claim) -> Claim:
        """A claim on another search."""
        create_search(engine, request_for())
        return taken(engine)

    def test_reading_resumes_after_an_id(self, engine: Engine, claim: Claim, other: Claim) -> None:
        for number in range(5):
            tell(engine, claim, "notice", {"message": number}, str(number))
            tell(engine, other, "notice", {"message": -1}, str(number))
        first = events_after(engine, claim.search_id, 0, limit=4)
        rest = events_after(engine, claim.search_id, first[-1].id)
        assert [event.data.get("message") for event in first + rest] == [None, None, 0, 1, 2, 3, 4]
        assert events_after(engine, claim.search_id, rest[-1].id) == []

    def test_under_a_key_one_thing_is_told_once_to_each_search(
        self, engine: Engine, claim: Claim, other: Claim
    ) -> None:
        assert tell(engine, claim, "notice", {"message": "first"}, "k")
        assert not tell(engine, claim, "notice", {"message": "second"}, "k")
        assert tell(engine, other, "notice", {"message": "first"}, "k")
        told = [event.data for event in events_after(engine, claim.search_id, 0) if event.kind == "notice"]
        assert told == [{"message": "first"}]

    def test_the_next_attempt_does_not_say_it_again(self, engine: Engine, claim: Claim) -> None:
        tell(engine, claim, "measured", {"number": 1}, "measured:1")
        queue.release(engine, claim)
        assert not tell(engine, taken(engine), "measured", {"number": 1}, "measured:1")

    def test_ids_become_visible_in_order(self, engine: Engine, claim: Claim) -> None:
        seen: list[int] = []

        def write(name: int) -> None:
            for number in range(25):
                tell(engine, claim, "notice", {}, f"{name} {number}")
                tell(engine, claim, "notice", {}, f"all {number}")

        def read() -> list[int]:
            return [event.id for event in events_after(engine, claim.search_id, seen[-1] if seen else 0)]

        writers = [aside(write, name) for name in range(4)]
        while not all(writer.done() for writer in writers):
            seen += read()
        results(writers)
        seen += read()
        assert seen == [event.id for event in events_after(engine, claim.search_id, 0)]
        assert len(seen) == 2 + 4 * 25 + 25


class TestResults:
    def test_the_first_value_stays_with_the_search_that_computed_it(self, engine: Engine, queued: Search) -> None:
        other = create_search(engine, request_for())[0]
        assert put_result(engine, "k", "measurement", {"loss": 0.5}, 1.5, queued.id)
        assert not put_result(engine, "k", "measurement", {"loss": 0.7}, 2.5, other.id)
        assert get_results(engine, ["k", "missing"]) == {"k": Stored({"loss": 0.5}, queued.id)}

    def test_it_outlives_that_search(self, engine: Engine, queued: Search) -> None:
        put_result(engine, "k", "probe", 7, 0.0, queued.id)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM searches"))
        assert get_results(engine, ["k"]) == {"k": Stored(7, None)}

    def test_many_keys_and_none(self, engine: Engine) -> None:
        for number in range(3):
            put_result(engine, f"k{number}", "probe", number, 0.0, None)
        found = get_results(engine, [f"k{number}" for number in range(70_000)])
        assert {key: stored.value for key, stored in found.items()} == {"k0": 0, "k1": 1, "k2": 2}
        assert get_results(engine, []) == {}

    def test_floats_come_back_to_the_bit(self, engine: Engine) -> None:
        values = [0.1, 1e-300, 123456789012345.6, 2.0**-1074, 1 / 3]
        put_result(engine, "k", "sensitivity", {"values": [values, [None]]}, 0.0, None)
        assert get_results(engine, ["k"])["k"].value == {"values": [values, [None]]}

    def test_nan_is_refused(self, engine: Engine) -> None:
        with pytest.raises(ValueError, match="neither NaN nor Infinity"):
            put_result(engine, "k", "probe", {"values": [math.nan]}, 0.0, None)
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

    def test_only_what_differs_from_what_was_stored_is_written(self, engine: Engine, claim: Claim) -> None:
        third = replace(self.FIRST, number=2)
        before = [self.FIRST, self.SECOND, third]
        put_candidates(engine, claim, before)
        untouched = self.versions(engine)[0]
        after = [self.FIRST, replace(self.SECOND, fits=False), replace(self.FIRST, number=3)]
        for _ in range(2):
            put_candidates(engine, claim, after, before)
            assert candidates(engine, claim.search_id) == after
        versions = self.versions(engine)
        assert versions[0] == untouched
        put_candidates(engine, claim, list(after), after)
        assert self.versions(engine) == versions, "nothing new, nothing written"
        put_candidates(engine, claim, [], after)
        assert candidates(engine, claim.search_id) == []

    def test_what_an_attempt_before_has_stored_is_replaced(self, engine: Engine, claim: Claim) -> None:
        put_candidates(engine, claim, [self.FIRST, self.SECOND])
        queue.release(engine, claim)
        again = taken(engine)
        put_candidates(engine, again, [self.SECOND])
        assert candidates(engine, claim.search_id) == [self.SECOND]

    @staticmethod
    def versions(engine: Engine) -> list[Any]:
        """What Postgres has written each candidate in, by number."""
        with engine.connect() as connection:
            return [
                tuple(row) for row in connection.execute(text("SELECT number, xmin FROM candidates ORDER BY number"))
            ]

    def test_allocations_are_read_where_they_are_asked_for(self, engine: Engine, claim: Claim) -> None:
        put_candidates(engine, claim, [self.FIRST, self.SECOND])
        bare = [replace(one, allocation={}) for one in (self.FIRST, self.SECOND)]
        assert candidates(engine, claim.search_id, allocations=False) == bare
        assert allocations(engine, claim.search_id, [1, 7]) == {1: self.SECOND.allocation}
        assert candidate(engine, claim.search_id, 1) == self.SECOND
        assert candidate(engine, claim.search_id, 7) is None

    def test_the_best_is_found_without_reading_the_others(self, engine: Engine, claim: Claim) -> None:
        def measured(number: int, loss: float, bits: float, **about: Any) -> Candidate:
            measured_loss, costs = {"loss": loss}, {"avg_bits": bits}
            return replace(self.SECOND, number=number, metrics=measured_loss, costs=costs, allocation={}, **about)

        uniform = measured(0, 9.0, 9.0, source="uniform", fits=False)
        cheap, good, same, over = (
            measured(1, 2.0, 3.0), measured(2, 1e-5, 4.0), measured(3, 1e-5, 3.5), measured(4, 0.0, 9.0, fits=False)
        )  # fmt: skip
        unmeasured = replace(self.FIRST, number=5, fits=True)
        put_candidates(engine, claim, [uniform, cheap, good, same, over, unmeasured])
        loss: tuple[Group, str] = ("metrics", "loss")
        bits: tuple[Group, str] = ("costs", "avg_bits")
        create_search(engine, request_for())
        other = queue.claim(engine, "me", LEASE)
        assert other is not None
        put_candidates(engine, other, [uniform, cheap, good, same])
        found = best_and_uniform(engine, {claim.search_id: [loss, bits], other.search_id: [bits, loss], 99: [loss]})
        assert found == {claim.search_id: [uniform, same], other.search_id: [uniform, cheap], 99: []}
        assert best_and_uniform(engine, {}) == {}

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
