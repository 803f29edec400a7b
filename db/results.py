"""Finished computations, found again by the content of what they were computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ARRAY, Engine, Text, any_, delete, literal, select
from sqlalchemy.dialects.postgresql import insert

from db import tallies
from db.tables import ResultRow


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored result, and the search that computed it, where one did and is still there."""

    value: Any
    search_id: int | None


def get_results(engine: Engine, keys: Sequence[str]) -> dict[str, Stored]:
    """What is stored under `keys`; keys that are not there are left out."""
    query = select(ResultRow.key, ResultRow.value, ResultRow.search_id)
    query = query.where(ResultRow.key == any_(literal(list(keys), ARRAY(Text))))
    with engine.connect() as connection:
        return {row.key: Stored(row.value, row.search_id) for row in connection.execute(query)}


def put_result(engine: Engine, key: str, kind: str, value: Any, seconds: float, search_id: int | None) -> bool:
    """Store what took a search `seconds` to compute, and count it; whether it is new: what is already there stays.

    Raises ValueError when `value` is not JSON.
    """
    row = insert(ResultRow).values(key=key, kind=kind, value=value, seconds=seconds, search_id=search_id)
    with engine.begin() as connection:
        stored = connection.execute(row.on_conflict_do_nothing().returning(ResultRow.key)).first()
        if stored is not None:
            tallies.add(connection, "results_computed", kind, 1)
        return stored is not None


def forget_result(engine: Engine, key: str) -> None:
    """Delete what is stored under `key`, which turned out to be wrong."""
    with engine.begin() as connection:
        connection.execute(delete(ResultRow).where(ResultRow.key == key))
