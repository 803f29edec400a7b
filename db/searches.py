"""Searches as rows: create, read, list."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Select, func, literal, select, text, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB

from db.append import append
from db.errors import IdempotencyMismatch, QuotaExceeded
from db.keys import Key
from db.notify import QUEUE, notify
from db.queue import Claim, hold
from db.states import Stage, State
from db.tables import ApiKeyRow, SearchRow
from search.errors import NotFound
from search.request import SearchRequest

# Spelled out in the statement: a bound parameter would hide from the planner that the partial index holds.
_OPEN = [literal(state, literal_execute=True) for state in ("queued", "running")]


BRIEF = ("computed", "reused", "reused_from", "axes")


@dataclass(frozen=True, slots=True)
class Search:
    """One request from POST to frontier.

    `done` of `total` is the progress inside `stage`. `error` is a problem document: the reason of a failed search; on
    one that is queued or running, what ended the attempt before. `summary` grows while the search runs. `key_id` is the
    API key that posted it, None where none was asked for.
    """

    id: int
    state: State
    stage: Stage | None
    done: int
    total: int
    request: dict[str, Any]
    model: str
    target: str
    priority: int
    attempt: int
    max_attempts: int
    owner: str | None
    lease_until: datetime | None
    key_id: int | None
    cancel_requested: bool
    error: dict[str, Any] | None
    summary: dict[str, Any] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


def create_search(
    engine: Engine,
    request: SearchRequest,
    *,
    idempotency_key: str | None = None,
    key: Key | None = None,
    priority: int = 0,
) -> tuple[Search, bool]:
    """Queue a search and wake a worker; the search, and whether it was created just now.

    An idempotency key that the API key `key` used before with the same request (its defaults filled in) gives the
    search of that time. Raises IdempotencyMismatch when the request was another, QuotaExceeded when `key` has as many
    unfinished searches as it may. A search of a higher `priority` runs earlier.
    """
    body, digest = _body_and_digest(request)
    key_id = key.id if key else None
    row = postgresql.insert(SearchRow).values(
        request=body,
        model=request.model,
        target=request.target,
        priority=priority,
        key_id=key_id,
        idempotency_key=idempotency_key,
        body_digest=digest,
    )
    row = row.on_conflict_do_nothing(
        index_elements=[SearchRow.key_id, SearchRow.idempotency_key], index_where=text("idempotency_key IS NOT NULL")
    )
    with engine.begin() as connection:
        created = connection.execute(row.returning(SearchRow.id)).scalar()
        if created is not None:
            append(connection, created, "state", {"state": "queued"})
            notify(connection, QUEUE, created)
            search = _read(connection, created)
            if key:
                # Last, so that others who post under the key wait for little more than the commit.
                _check_quota(connection, key)
            return search, True
        earlier = _created(connection, digest, idempotency_key, key_id)
        assert earlier is not None, "it was in the way"
        return earlier, False


def find_created(
    engine: Engine, request: SearchRequest, *, idempotency_key: str, key: Key | None = None
) -> Search | None:
    """The search that the idempotency key gave before, as `create_search` would give it again; None when it is new.

    Raises IdempotencyMismatch when the request was another.
    """
    _, digest = _body_and_digest(request)
    with engine.connect() as connection:
        return _created(connection, digest, idempotency_key, key.id if key else None)


def get_search(engine: Engine, search_id: int, *, key_id: int | None = None) -> Search:
    """The search with this id, where `key_id` is given, only if that key posted it. Raises NotFound."""
    with engine.connect() as connection:
        return _read(connection, search_id, key_id)


def list_searches(
    engine: Engine,
    *,
    limit: int,
    before: int | None = None,
    state: str | None = None,
    model: str | None = None,
    key_id: int | None = None,
) -> list[Search]:
    """At most `limit` searches, newest first: below the id `before`, in this state, of this model, of this key.

    Of their requests and summaries, which may be large, only the budgets and the objective, and the axes and what was
    computed and reused.
    """
    query = _query(brief=True).order_by(SearchRow.id.desc()).limit(limit)
    if before is not None:
        query = query.where(SearchRow.id < before)
    if state is not None:
        query = query.where(SearchRow.state == state)
    if model is not None:
        query = query.where(SearchRow.model == model)
    if key_id is not None:
        query = query.where(SearchRow.key_id == key_id)
    with engine.connect() as connection:
        return [Search(*row) for row in connection.execute(query)]


def searched_models(engine: Engine, *, key_id: int | None = None) -> list[str]:
    """The models that there are searches of, by name; where `key_id` is given, those that this key posted."""
    query = select(SearchRow.model).distinct().order_by(SearchRow.model)
    if key_id is not None:
        query = query.where(SearchRow.key_id == key_id)
    with engine.connect() as connection:
        return list(connection.execute(query).scalars())


def set_summary(engine: Engine, claim: Claim, summary: dict[str, Any]) -> None:
    """Replace the summary of the claimed search. Raises LeaseLost when it is no longer ours."""
    with engine.begin() as connection:
        hold(connection, claim)
        connection.execute(update(SearchRow).where(SearchRow.id == claim.search_id).values(summary=summary))


def count_by_state(engine: Engine) -> dict[str, int]:
    """How many searches are in each state; states that none is in are left out."""
    query = select(SearchRow.state, func.count()).group_by(SearchRow.state)
    with engine.connect() as connection:
        return dict(connection.execute(query).all())


def oldest_queued_seconds(engine: Engine) -> float:
    """For how long the oldest queued search has been there, by the database's clock; 0 when none is queued."""
    queued = SearchRow.state == literal("queued", literal_execute=True)
    query = select(func.extract("epoch", func.now() - func.min(SearchRow.created_at))).where(queued)
    with engine.connect() as connection:
        return float(connection.execute(query).scalar() or 0)


def open_by_key(engine: Engine) -> dict[int, int]:
    """How many unfinished searches each key has, by the key's id; keys that have none are left out."""
    query = select(SearchRow.key_id, func.count()).where(SearchRow.key_id.is_not(None), SearchRow.state.in_(_OPEN))
    with engine.connect() as connection:
        rows = connection.execute(query.group_by(SearchRow.key_id)).all()
    return {key_id: count for key_id, count in rows if key_id is not None}


def _body_and_digest(request: SearchRequest) -> tuple[dict[str, Any], str]:
    body = request.model_dump(mode="json")
    return body, hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _created(connection: Connection, digest: str, idempotency_key: str | None, key_id: int | None) -> Search | None:
    of_key = select(SearchRow.id, SearchRow.body_digest).where(
        SearchRow.key_id.is_not_distinct_from(key_id), SearchRow.idempotency_key == idempotency_key
    )
    earlier = connection.execute(of_key).first()
    if earlier is None:
        return None
    if earlier.body_digest != digest:
        raise IdempotencyMismatch(
            f"the key '{idempotency_key}' belongs to search {earlier.id}, whose request was another",
            field="Idempotency-Key",
            value=idempotency_key,
            accepted="the same request, or a new key",
        )
    return _read(connection, earlier.id)


def _check_quota(connection: Connection, key: Key) -> None:
    """Raise QuotaExceeded when this transaction's search is one too many.

    Whoever posts under the same key waits until the transaction ends, so that the quota is exact.
    """
    connection.execute(select(ApiKeyRow.id).where(ApiKeyRow.id == key.id).with_for_update(key_share=True))
    unfinished = select(func.count()).where(SearchRow.key_id == key.id, SearchRow.state.in_(_OPEN))
    if connection.execute(unfinished).scalar_one() > key.max_open:
        raise QuotaExceeded(
            f"the key '{key.name}' has {key.max_open} unfinished searches already; let one finish, or cancel one",
            field="max_open",
            value=key.max_open + 1,
            accepted=f"at most {key.max_open} unfinished searches",
        )


def _query(*, brief: bool = False) -> Select[Any]:
    columns = {field.name: SearchRow.__table__.c[field.name] for field in fields(Search)}
    if brief:
        parts = [part for name in BRIEF for part in (name, SearchRow.summary[name])]
        told = func.jsonb_strip_nulls(func.jsonb_build_object(*parts))
        objective = func.jsonb_build_object("objective", SearchRow.request["optimizer"]["objective"])
        asked = ("budgets", SearchRow.request["budgets"], "optimizer", objective)
        columns["request"] = func.jsonb_build_object(*asked, type_=JSONB).label("request")
        columns["summary"] = func.nullif(told, literal({}, JSONB), type_=JSONB).label("summary")
    return select(*columns.values())


def _read(connection: Connection, search_id: int, key_id: int | None = None) -> Search:
    query = _query().where(SearchRow.id == search_id)
    if key_id is not None:
        query = query.where(SearchRow.key_id == key_id)
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"there is no search {search_id}")
    return Search(*row)
