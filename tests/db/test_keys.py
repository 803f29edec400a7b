"""API keys: who is let in, how much each may have open, and that their idempotency keys are their own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from db import queue
from db.errors import IdempotencyMismatch, QuotaExceeded
from db.events import events_after
from db.keys import Key, any_keys, create_key, find_key, list_keys, revoke_key
from db.searches import Search, create_search, get_search, list_searches, open_by_key
from search.errors import BitfrontierError, Conflict, InvalidRequest, NotFound
from tests.aside import aside, results
from tests.db.conftest import request_for, taken

MANY = 20


def key_of(engine: Engine, name: str = "ada", **limits: Any) -> Key:
    return create_key(engine, name, ["write"], **limits)[0]


def at_once(engine: Engine, count: int = MANY, **how: Any) -> list[tuple[Search, bool] | BitfrontierError]:
    """What so many threads get that post the same request at once."""

    def post() -> tuple[Search, bool] | BitfrontierError:
        try:
            return create_search(engine, request_for(), **how)
        except BitfrontierError as refusal:
            return refusal

    return results([aside(post) for _ in range(count)])


class TestTokens:
    def test_a_key_is_found_by_its_token_alone(self, engine: Engine) -> None:
        assert not any_keys(engine)
        key, token = create_key(engine, "ada", ["write", "read", "read"], max_open=3, rate_per_minute=60)
        other, _ = create_key(engine, "bob", ["admin"])
        assert token.startswith("bf_")
        assert len(token) == 46
        found = find_key(engine, token)
        assert found is not None
        assert (found.id, found.name, found.scopes) == (key.id, "ada", {"read", "write"})
        assert (found.max_open, found.rate_per_minute) == (3, 60)
        assert list_keys(engine)[1] == other
        assert any_keys(engine)

    def test_tokens_are_not_stored(self, engine: Engine) -> None:
        _, token = create_key(engine, "ada", ["read"])
        with engine.connect() as connection:
            row = str(connection.execute(text("SELECT api_keys::text FROM api_keys")).scalar())
        assert token not in row
        assert token.removeprefix("bf_") not in row

    @pytest.mark.parametrize(
        "token", ["", "bf_", "bf_wrong", "BF_", "\0", "\udcff", "é" * 9, "x" * 10**6, "' OR 1=1 --"], ids=range(9)
    )
    def test_others_are_nobodys(self, engine: Engine, token: str) -> None:
        create_key(engine, "ada", ["read"])
        assert find_key(engine, token) is None

    def test_nobody_gets_in_by_a_part_or_another_spelling(self, engine: Engine) -> None:
        _, token = create_key(engine, "ada", ["read"])
        for wrong in (token[:-1], token + "x", token.swapcase(), token.removeprefix("bf_"), f" {token}"):
            assert find_key(engine, wrong) is None

    def test_a_revoked_key_is_refused_from_then_on(self, engine: Engine) -> None:
        key, token = create_key(engine, "ada", ["read"])
        revoke_key(engine, "ada")
        assert find_key(engine, token) is None
        (revoked,) = list_keys(engine)
        assert revoked.id == key.id
        assert revoked.revoked_at is not None
        revoke_key(engine, "ada")
        assert list_keys(engine) == [revoked], "the time of the first revocation stays"
        with pytest.raises(NotFound, match="'eve'"):
            revoke_key(engine, "eve")

    def test_a_key_expires_by_the_databases_clock(self, engine: Engine) -> None:
        key, token = create_key(engine, "ada", ["read"], expires=timedelta(days=90))
        assert key.expires_at == key.created_at + timedelta(days=90)
        assert find_key(engine, token) is not None
        with engine.begin() as connection:
            connection.execute(text("UPDATE api_keys SET expires_at = now()"))
        assert find_key(engine, token) is None

    def test_the_last_use_is_written_once_a_minute(self, engine: Engine) -> None:
        _, token = create_key(engine, "ada", ["read"])
        assert list_keys(engine)[0].last_used_at is None
        for _ in range(2):
            find_key(engine, token)
        first = list_keys(engine)[0].last_used_at
        find_key(engine, token)
        assert list_keys(engine)[0].last_used_at == first
        with engine.begin() as connection:
            connection.execute(text("UPDATE api_keys SET last_used_at = now() - interval '61 seconds'"))
        find_key(engine, token)
        later = list_keys(engine)[0].last_used_at
        assert first is not None
        assert later is not None
        assert later >= first

    def test_who_reads_is_let_in_when_the_disk_is_full(self, engine: Engine) -> None:
        key, token = create_key(engine, "ada", ["read"])
        with engine.begin() as connection:
            connection.execute(
                text(
                    "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql"
                    " AS $$ BEGIN RAISE EXCEPTION 'no space' USING ERRCODE = '53100'; END $$"
                )
            )
            connection.execute(text("CREATE TRIGGER full_disk BEFORE UPDATE ON api_keys EXECUTE FUNCTION full_disk()"))
        try:
            assert find_key(engine, token) == key
        finally:
            with engine.begin() as connection:
                connection.execute(text("DROP FUNCTION full_disk CASCADE"))

    def test_a_name_is_never_given_twice(self, engine: Engine) -> None:
        create_key(engine, "ada", ["read"])
        revoke_key(engine, "ada")
        with pytest.raises(Conflict, match="'ada'"):
            create_key(engine, "ada", ["read"])

    @pytest.mark.parametrize(
        ("field", "wrong"),
        [
            ("name", {"name": " "}),
            ("name", {"name": "a\0b"}),
            ("name", {"name": "x" * 101}),
            ("scopes", {"scopes": []}),
            ("scopes", {"scopes": ["read", "root"]}),
            ("expires", {"expires": timedelta(0)}),
            ("expires", {"expires": timedelta.max}),
            ("max_open", {"max_open": 0}),
            ("rate_per_minute", {"rate_per_minute": 2**31}),
        ],
    )
    def test_what_is_not_accepted_is_named(self, engine: Engine, field: str, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequest) as refusal:
            create_key(engine, **{"name": "ada", "scopes": ["read"]} | wrong)
        assert refusal.value.field == field
        assert not any_keys(engine)


class TestQuota:
    def test_it_is_exact_however_many_post_at_once(self, engine: Engine) -> None:
        key = key_of(engine, max_open=7)
        outcomes = at_once(engine, key=key)
        refusals = [outcome for outcome in outcomes if isinstance(outcome, BitfrontierError)]
        assert len(list_searches(engine, limit=MANY, key_id=key.id)) == MANY - len(refusals) == 7
        assert {type(refusal) for refusal in refusals} == {QuotaExceeded}
        assert refusals[0].problem()["status"] == 429
        assert "7" in refusals[0].problem()["accepted"]

    def test_a_search_that_ends_makes_room(self, engine: Engine) -> None:
        key = key_of(engine, max_open=1)
        create_search(engine, request_for(), key=key)
        claim = taken(engine)
        with pytest.raises(QuotaExceeded):
            create_search(engine, request_for(), key=key)
        queue.succeed(engine, claim, {})
        create_search(engine, request_for(), key=key)

    def test_what_is_refused_leaves_nothing_and_takes_nothing_from_others(self, engine: Engine) -> None:
        key, other = key_of(engine, "ada", max_open=1), key_of(engine, "bob", max_open=1)
        create_search(engine, request_for(), key=key)
        with pytest.raises(QuotaExceeded):
            create_search(engine, request_for(), idempotency_key="k", key=key)
        create_search(engine, request_for(), key=other)
        create_search(engine, request_for())
        assert [search.key_id for search in list_searches(engine, limit=9)] == [None, other.id, key.id]
        assert open_by_key(engine) == {key.id: 1, other.id: 1}

    def test_a_repeat_is_never_refused(self, engine: Engine) -> None:
        key = key_of(engine, max_open=1)
        first, _ = create_search(engine, request_for(), idempotency_key="k", key=key)
        assert create_search(engine, request_for(), idempotency_key="k", key=key) == (first, False)
        with pytest.raises(IdempotencyMismatch):
            create_search(engine, request_for(avg_bits=5), idempotency_key="k", key=key)


class TestIdempotency:
    @pytest.mark.parametrize("with_key", [True, False])
    def test_an_idempotency_key_used_by_many_at_once_gives_one_search(self, engine: Engine, with_key: bool) -> None:
        key = key_of(engine, max_open=1) if with_key else None
        outcomes = at_once(engine, idempotency_key="k", key=key)
        made = [outcome for outcome in outcomes if not isinstance(outcome, BitfrontierError)]
        assert len(made) == MANY, outcomes
        assert sum(created for _, created in made) == 1
        (search,) = list_searches(engine, limit=9)
        assert {one.id for one, _ in made} == {search.id}
        assert len(events_after(engine, search.id, 0)) == 1

    def test_each_key_has_idempotency_keys_of_its_own(self, engine: Engine) -> None:
        keys = [None, key_of(engine, "ada"), key_of(engine, "bob")]
        made = [create_search(engine, request_for(), idempotency_key="k", key=key) for key in keys]
        assert all(created for _, created in made)
        again = [create_search(engine, request_for(), idempotency_key="k", key=key) for key in keys]
        assert [search for search, _ in again] == [search for search, _ in made]


def test_anothers_search_is_as_missing_as_one_that_is_not_there(engine: Engine) -> None:
    ada, bob = key_of(engine, "ada"), key_of(engine, "bob")
    search, _ = create_search(engine, request_for(), key=ada)
    open_to_all, _ = create_search(engine, request_for())
    assert get_search(engine, search.id, key_id=ada.id) == get_search(engine, search.id) == search
    for hidden in (search.id, open_to_all.id, 17):
        with pytest.raises(NotFound, match=f"^there is no search {hidden}$"):
            get_search(engine, hidden, key_id=bob.id)
    assert list_searches(engine, limit=9, key_id=bob.id) == []
    assert [one.id for one in list_searches(engine, limit=9, key_id=ada.id)] == [search.id]
