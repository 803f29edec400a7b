"""The event log of a search: append, read on from an id, wait for more."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, insert, select

from db.notify import EVENTS, listen, notify
from db.tables import EventRow, SearchRow
from search.errors import NotFound


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a search; ids grow within a search in the order in which they become visible."""

    id: int
    kind: str
    data: dict[str, Any]
    created_at: datetime


def add_event(engine: Engine, search_id: int, kind: str, data: dict[str, Any]) -> int:
    """Append an event and wake its readers; its id.

    Raises NotFound without such a search, ValueError when `data` is not JSON.
    """
    with engine.begin() as connection:
        # Writers of one search take turns: else a reader could see id 8 before 7 commits, and resume past it.
        lock = select(SearchRow.id).where(SearchRow.id == search_id).with_for_update(key_share=True)
        if connection.execute(lock).first() is None:
            raise NotFound(f"there is no search {search_id}")
        return append(connection, search_id, kind, data)


def append(connection: Connection, search_id: int, kind: str, data: dict[str, Any]) -> int:
    """Append within a transaction that holds the row of the search."""
    event = insert(EventRow).values(search_id=search_id, kind=kind, data=data).returning(EventRow.id)
    event_id = connection.execute(event).scalar_one()
    notify(connection, EVENTS, search_id)
    return event_id


def events_after(engine: Engine, search_id: int, after: int, limit: int = 500) -> list[Event]:
    """The first `limit` events of a search whose id is greater than `after`, oldest first."""
    query = (
        select(EventRow.id, EventRow.kind, EventRow.data, EventRow.created_at)
        .where(EventRow.search_id == search_id, EventRow.id > after)
        .order_by(EventRow.id)
        .limit(limit)
    )
    with engine.connect() as connection:
        return [Event(*row) for row in connection.execute(query)]


def wait_for_event(engine: Engine, search_id: int, timeout: float, *, after: int | None = None) -> None:
    """Return at the search's next event, or after `timeout` seconds; at once if an event later than `after` exists."""
    later = None
    if after is not None:
        later = select(EventRow.id).where(EventRow.search_id == search_id, EventRow.id > after)
    listen(engine, EVENTS, timeout, search_id=search_id, unless=later)
