"""Appending to the event log, within the transaction of what is told."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.dialects.postgresql import insert

from db.notify import EVENTS, notify
from db.tables import EventRow


def append(connection: Connection, search_id: int, kind: str, data: dict[str, Any], once: str | None = None) -> bool:
    """Append an event, unless the search has one under `once`; whether it is new.

    The transaction must hold the row of the search: writers of one search take turns, else a reader could see id 8
    before 7 commits, and resume past it.
    """
    event = insert(EventRow).values(search_id=search_id, kind=kind, data=data, once=once)
    event = event.on_conflict_do_nothing(index_elements=[EventRow.search_id, EventRow.once])
    is_new = connection.execute(event.returning(EventRow.id)).first() is not None
    if is_new:
        notify(connection, EVENTS, search_id)
    return is_new
