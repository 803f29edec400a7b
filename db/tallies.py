"""Counters that only rise, each in the transaction of what it counts."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Connection, Engine, select
from sqlalchemy.dialects.postgresql import insert

from db.tables import TallyRow

Tally = Literal[
    "attempts_failed",  # label: none
    "results_computed",  # label: the kind of result
    "results_reused",  # label: the kind of result
    "searches_finished",  # label: the final state
    "stage_count",  # label: the stage
    "stage_seconds",  # label: the stage
]


def add(connection: Connection, name: Tally, label: str, amount: float) -> None:
    """Raise a counter when this transaction commits.

    The counter stays locked until then: a transaction that raises several does so in the order of their names and
    labels, lest two wait for each other.
    """
    row = insert(TallyRow).values(name=name, label=label, value=amount)
    raised = {"value": TallyRow.value + row.excluded.value}
    connection.execute(row.on_conflict_do_update(index_elements=[TallyRow.name, TallyRow.label], set_=raised))


def read(engine: Engine) -> dict[tuple[str, str], float]:
    """All counters by name and label; those that never rose are left out."""
    with engine.connect() as connection:
        rows = connection.execute(select(TallyRow.name, TallyRow.label, TallyRow.value))
        return {(row.name, row.label): row.value for row in rows}
