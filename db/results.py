"""Finished computations, found again by the content of what they were computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ARRAY, Engine, Text, any_, literal, select
from sqlalchemy.dialects.postgresql import insert

from db.tables import ResultRow


def get_results(engine: Engine, keys: Sequence[str]) -> dict[str, Any]:
    """The values stored under `keys`; keys that are not there are left out."""
    query = select(ResultRow.key, ResultRow.value).where(ResultRow.key == any_(literal(list(keys), ARRAY(Text))))
    with engine.connect() as connection:
        return dict(connection.execute(query).all())


def put_result(engine: Engine, key: str, kind: str, value: Any, seconds: float) -> None:
    """Store what took `seconds` to compute; a value that is already there stays.

    Raises ValueError when `value` is not JSON.
    """
    row = insert(ResultRow).values(key=key, kind=kind, value=value, seconds=seconds)
    with engine.begin() as connection:
        connection.execute(row.on_conflict_do_nothing())
