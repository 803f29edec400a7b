"""Searches as rows: create, read, list."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Select, select, update
from sqlalchemy.dialects import postgresql

from db.errors import IdempotencyMismatch
from db.events import append
from db.notify import QUEUE, notify
from db.queue import Claim, hold
from db.tables import SearchRow, Stage, State
from search.errors import NotFound
from search.request import SearchRequest


@dataclass(frozen=True, slots=True)
class Search:
    """One request from POST to frontier.

    `done` of `total` is the progress inside `stage`. `error` is a problem document: the reason of a failed search; on
    one that is queued or running, what ended the attempt before. `summary` grows while the search runs.
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
    cancel_requested: bool
    error: dict[str, Any] | None
    summary: dict[str, Any] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


def create_search(engine: Engine, request: SearchRequest, *, idempotency_key: str | None = None) -> tuple[Search, bool]:
    """Queue a search and wake a worker; the search, and whether it was created just now.

    A key that was used before with the same request (its defaults filled in) gives the search of that time. Raises
    IdempotencyMismatch when the request was another.
    """
    body = request.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    row = postgresql.insert(SearchRow).values(
        request=body, model=request.model, target=request.target, idempotency_key=idempotency_key, body_digest=digest
    )
    row = row.on_conflict_do_nothing(index_elements=[SearchRow.idempotency_key])
    with engine.begin() as connection:
        created = connection.execute(row.returning(SearchRow.id)).scalar()
        if created is not None:
            append(connection, created, "state", {"state": "queued"})
            notify(connection, QUEUE, created)
            return _read(connection, created), True
        of_key = select(SearchRow.id, SearchRow.body_digest).where(SearchRow.idempotency_key == idempotency_key)
        earlier = connection.execute(of_key).one()
        if earlier.body_digest != digest:
            raise IdempotencyMismatch(
                f"the key '{idempotency_key}' belongs to search {earlier.id}, whose request was another",
                field="Idempotency-Key",
                value=idempotency_key,
                accepted="the same request, or a new key",
            )
        return _read(connection, earlier.id), False


def get_search(engine: Engine, search_id: int) -> Search:
    """The search with this id. Raises NotFound."""
    with engine.connect() as connection:
        return _read(connection, search_id)


def list_searches(
    engine: Engine, *, limit: int, before: int | None = None, state: str | None = None, model: str | None = None
) -> list[Search]:
    """At most `limit` searches, newest first: those with an id below `before`, in this state, of this model."""
    query = _query().order_by(SearchRow.id.desc()).limit(limit)
    if before is not None:
        query = query.where(SearchRow.id < before)
    if state is not None:
        query = query.where(SearchRow.state == state)
    if model is not None:
        query = query.where(SearchRow.model == model)
    with engine.connect() as connection:
        return [Search(*row) for row in connection.execute(query)]


def set_summary(engine: Engine, claim: Claim, summary: dict[str, Any]) -> None:
    """Replace the summary of the claimed search. Raises LeaseLost when it is no longer ours."""
    with engine.begin() as connection:
        hold(connection, claim)
        connection.execute(update(SearchRow).where(SearchRow.id == claim.search_id).values(summary=summary))


def _query() -> Select[Any]:
    return select(*(SearchRow.__table__.c[field.name] for field in fields(Search)))


def _read(connection: Connection, search_id: int) -> Search:
    row = connection.execute(_query().where(SearchRow.id == search_id)).first()
    if row is None:
        raise NotFound(f"there is no search {search_id}")
    return Search(*row)
