"""What runs often reads by an index, however many searches there are: each statement is caught as it is sent, and its
plan is measured at 100,000 searches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text

from db import queue
from db.keys import create_key
from db.searches import create_search, get_search, list_searches, oldest_queued_seconds
from db.tables import Base
from tests.db.conftest import LEASE, request_for

ROWS = 100_000
KEYS = 200
PAGES = 200
"""Of eight kilobytes that a statement may look at; the table has thousands."""


@dataclass(frozen=True)
class Plan:
    """How a statement was carried out."""

    statement: str
    nodes: list[dict[str, Any]]

    @property
    def indexes(self) -> set[str]:
        return {node["Index Name"] for node in self.nodes if "Index Name" in node}

    @property
    def pages(self) -> int:
        return int(self.nodes[0]["Shared Hit Blocks"] + self.nodes[0]["Shared Read Blocks"])

    @property
    def scans_all(self) -> bool:
        return any(node["Node Type"] == "Seq Scan" for node in self.nodes)


@pytest.fixture(scope="module")
def crowded(migrated_engine: Engine) -> Iterator[Engine]:
    """100,000 searches, of which the older half is finished, and 100 run; each of 200 keys has as many."""
    tables = ", ".join(Base.metadata.tables)
    with migrated_engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {tables} RESTART IDENTITY"))
    for number in range(KEYS):
        create_key(migrated_engine, f"key {number}", ["write"], max_open=ROWS)
    with migrated_engine.begin() as connection:
        # Without foreign keys, which would be looked up for each row.
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(
            text(
                "INSERT INTO searches (state, attempt, request, model, target, priority, owner, lease_until, key_id)"
                " SELECT CASE WHEN n % 1000 = 0 THEN 'running' WHEN n > :rows / 2 THEN 'queued'"
                "   ELSE (ARRAY['succeeded', 'failed', 'cancelled'])[1 + n % 3] END,"
                " n % 3, '{}', 'm', 't', n % 3, 'owner ' || n,"
                " CASE WHEN n % 1000 = 0 THEN now() + interval '1 hour' END, 1 + n % :keys"
                " FROM generate_series(1, :rows) n"
            ),
            {"keys": KEYS, "rows": ROWS},
        )
    with migrated_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE searches"))
    yield migrated_engine
    with migrated_engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {tables} RESTART IDENTITY"))


def post(engine: Engine) -> None:
    """As the key that has the most to count."""
    key, _ = create_key(engine, "another", ["write"], max_open=ROWS)
    create_search(engine, request_for(), idempotency_key="k", key=key)


CALLS: dict[str, tuple[Callable[[Engine], Any], set[str]]] = {
    "claim": (lambda engine: queue.claim(engine, "me", LEASE), {"searches_unfinished", "searches_spent"}),
    "recover": (lambda engine: queue.recover(engine, "owner 1000"), {"searches_state_id"}),
    "post": (post, {"searches_open"}),
    "repeat": (
        lambda engine: create_search(engine, request_for(), idempotency_key="k"),
        {"searches_idempotency"},
    ),
    "read": (lambda engine: get_search(engine, 5000, key_id=1), {"searches_pkey"}),
    "list": (lambda engine: list_searches(engine, limit=50), {"searches_pkey"}),
    "list a key's": (lambda engine: list_searches(engine, limit=50, key_id=7), {"searches_key_id_id"}),
    "list a key's next": (
        lambda engine: list_searches(engine, limit=50, key_id=7, before=50_000),
        {"searches_key_id_id"},
    ),
    "list running": (lambda engine: list_searches(engine, limit=50, state="running"), {"searches_state_id"}),
    "age of the queue": (oldest_queued_seconds, {"searches_queued"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_reads_its_index(crowded: Engine, name: str) -> None:
    call, indexes = CALLS[name]
    if name == "repeat":
        call(crowded)
    with planned(crowded) as plans:
        call(crowded)
    assert plans
    assert indexes <= set().union(*(plan.indexes for plan in plans)), plans
    for plan in plans:
        assert not plan.scans_all, plan
        assert plan.pages <= PAGES, plan


def test_what_a_claim_must_finish_is_found_among_the_others(crowded: Engine) -> None:
    with crowded.begin() as connection:
        connection.execute(
            text(
                "UPDATE searches SET state = 'running', attempt = 3, lease_until = now() - interval '1 s'"
                " WHERE id IN (70001, 70002)"
            )
        )
    with planned(crowded) as plans:
        queue.claim(crowded, "me", timedelta(hours=1))
    assert {get_search(crowded, number).state for number in (70001, 70002)} == {"failed"}
    assert not any(plan.scans_all for plan in plans), plans


@contextmanager
def planned(engine: Engine) -> Iterator[list[Plan]]:
    """The plans of the statements on searches that are sent meanwhile, each measured before it is carried out."""
    plans: list[Plan] = []

    def before(_connection: Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "searches" in statement:
            cursor.execute("SAVEPOINT measured")
            cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters)
            ((told,),) = cursor.fetchall()
            cursor.execute("ROLLBACK TO SAVEPOINT measured")
            plans.append(Plan(statement, list(nodes_of(told[0]["Plan"]))))

    event.listen(engine, "before_cursor_execute", before)
    try:
        yield plans
    finally:
        event.remove(engine, "before_cursor_execute", before)


def nodes_of(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for below in node.get("Plans", []):
        yield from nodes_of(below)
