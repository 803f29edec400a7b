"""The event log of a search: what its worker tells; read on from an id.

A worker tells everything under a key, and under its claim: what is told again after a lost answer is not said twice,
and after the event of the final state nothing follows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, select

from db import tallies
from db.append import append
from db.queue import Claim, hold
from db.states import Stage
from db.tables import EventRow


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a search; ids grow within a search in the order in which they become visible."""

    id: int
    kind: str
    data: dict[str, Any]
    created_at: datetime


def tell(engine: Engine, claim: Claim, kind: str, data: dict[str, Any], once: str) -> bool:
    """Append an event to the claimed search and wake its readers, unless it has one under the key `once`; whether it
    is new.

    Raises LeaseLost when the search is no longer ours, ValueError when `data` is not JSON.
    """
    with engine.begin() as connection:
        hold(connection, claim)
        return append(connection, claim.search_id, kind, data, once)


def end_stage(engine: Engine, claim: Claim, stage: Stage, seconds: float, reused: Mapping[str, int], once: str) -> bool:
    """Tell that a stage took so many seconds and reused so many results of other searches, by kind; whether that is
    new. Only then it is tallied.

    An attempt that goes through a stage again adds nothing when `once` is the same. Raises LeaseLost.
    """
    with engine.begin() as connection:
        hold(connection, claim)
        data = {"stage": stage, "seconds": seconds, "reused": dict(reused), "attempt": claim.attempt}
        is_new = append(connection, claim.search_id, "stage_end", data, once)
        if is_new:
            for kind, count in sorted(reused.items()):
                tallies.add(connection, "results_reused", kind, count)
            tallies.add(connection, "stage_count", stage, 1)
            tallies.add(connection, "stage_seconds", stage, seconds)
        return is_new


def events_after(
    engine: Engine, search_id: int, after: int, limit: int = 500, *, kinds: Collection[str] | None = None
) -> list[Event]:
    """The first `limit` events of a search whose id is greater than `after`, oldest first; all, or of these kinds."""
    query = (
        select(EventRow.id, EventRow.kind, EventRow.data, EventRow.created_at)
        .where(EventRow.search_id == search_id, EventRow.id > after)
        .order_by(EventRow.id)
        .limit(limit)
    )
    if kinds is not None:
        query = query.where(EventRow.kind.in_(kinds))
    with engine.connect() as connection:
        return [Event(*row) for row in connection.execute(query)]


def last_of_kind(engine: Engine, search_id: int, kind: str) -> Event | None:
    """The newest event of a kind of a search; None when it has none."""
    query = (
        select(EventRow.id, EventRow.kind, EventRow.data, EventRow.created_at)
        .where(EventRow.search_id == search_id, EventRow.kind == kind)
        .order_by(EventRow.id.desc())
        .limit(1)
    )
    with engine.connect() as connection:
        row = connection.execute(query).first()
    return Event(*row) if row else None


def last_event(engine: Engine, search_id: int) -> int:
    """The id of the newest event of a search; 0 when it has none."""
    query = select(EventRow.id).where(EventRow.search_id == search_id).order_by(EventRow.id.desc()).limit(1)
    with engine.connect() as connection:
        return connection.execute(query).scalar() or 0
