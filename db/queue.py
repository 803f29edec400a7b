"""The queue: workers claim searches under a lease, and every write of theirs is fenced by the claim.

`attempt` grows with each claim, so that a worker which was presumed dead, and is not, cannot touch what its successor
does: its writes match no row. Time is the database's; a worker's clock never counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Row, Select, and_, func, literal, or_, select, update

from db import tallies
from db.append import append
from db.errors import AttemptsExhausted
from db.notify import CANCEL, EVENTS, QUEUE, notify
from db.states import Stage, State
from db.tables import Json, SearchRow
from search.errors import NotFound


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on a search: void once the search was claimed again, cancelled or finished."""

    search_id: int
    attempt: int
    owner: str


class LeaseLost(Exception):
    """The search is no longer ours: stop working on it and write nothing."""

    def __init__(self, claim: Claim) -> None:
        super().__init__(f"search {claim.search_id} was taken from {claim.owner} (attempt {claim.attempt})")


def claim(engine: Engine, owner: str, lease: timedelta) -> Claim | None:
    """Take the next due search: the highest priority first, then the oldest; None when nothing is due.

    Due are queued searches and those whose worker has let its lease run out. Of the latter, one that was to be
    cancelled is cancelled, and one that has used up its attempts is failed. After a lost answer, `recover` says whether
    something was taken.
    """
    take = (
        update(SearchRow)
        .values(
            state="running",
            stage=None,
            done=0,
            total=0,
            attempt=SearchRow.attempt + 1,
            owner=owner,
            lease_until=func.now() + lease,
            started_at=func.coalesce(SearchRow.started_at, func.now()),
        )
        .returning(SearchRow.attempt)
    )
    with engine.begin() as connection:
        _settle(connection)
    with engine.begin() as connection:
        due = connection.execute(next_runnable()).first()
        if due is None:
            return None
        attempt = connection.execute(take.where(SearchRow.id == due.id)).scalar_one()
        append(connection, due.id, "state", {"state": "running"})
        if due.state == "running":
            tallies.add(connection, "attempts_failed", "", 1)
        return Claim(due.id, attempt, owner)


def recover(engine: Engine, owner: str) -> Claim | None:
    """The claim that `owner` has, if any: it was committed, though the answer may have been lost."""
    query = select(SearchRow.id, SearchRow.attempt).where(_is("running"), SearchRow.owner == owner)
    with engine.connect() as connection:
        row = connection.execute(query.order_by(SearchRow.id).limit(1)).first()
    return None if row is None else Claim(row.id, row.attempt, owner)


def next_runnable() -> Select[int, str]:
    """The id and state of what a claim takes; its row is locked, and rows that others have locked are passed over."""
    return (
        select(SearchRow.id, SearchRow.state)
        .where(_due(), ~_spent())
        .order_by(SearchRow.priority.desc(), SearchRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


def heartbeat(engine: Engine, claim: Claim, lease: timedelta) -> bool:
    """Renew the lease; whether the search is to be cancelled. Raises LeaseLost."""
    with engine.begin() as connection:
        return bool(_write(connection, claim, lease_until=func.now() + lease).cancel_requested)


def progress(engine: Engine, claim: Claim, stage: Stage, done: int, total: int) -> None:
    """Say that `done` of `total` steps of `stage` are finished; what was said last is not said again.

    Raises LeaseLost.
    """
    said = {"stage": stage, "done": done, "total": total}
    with engine.begin() as connection:
        held = hold(connection, claim)
        if (held.stage, held.done, held.total) != (stage, done, total):
            _write(connection, claim, **said)
            append(connection, claim.search_id, "progress", said)


def succeed(engine: Engine, claim: Claim, summary: dict[str, Any]) -> None:
    """Finish the search with its last summary. Raises LeaseLost."""
    with engine.begin() as connection:
        hold(connection, claim)
        _finish(connection, claim.search_id, "succeeded", summary=summary, error=None)


def fail(engine: Engine, claim: Claim, problem: dict[str, Any]) -> None:
    """Finish the search for good with the reason as a problem document. Raises LeaseLost."""
    with engine.begin() as connection:
        hold(connection, claim)
        _finish(connection, claim.search_id, "failed", error=problem)


def cancelled(engine: Engine, claim: Claim) -> None:
    """Confirm that the work on a search which is to be cancelled has stopped. Raises LeaseLost."""
    with engine.begin() as connection:
        hold(connection, claim)
        _finish(connection, claim.search_id, "cancelled")


def release(engine: Engine, claim: Claim, problem: dict[str, Any] | None = None) -> None:
    """Give the search back to the queue; with the `problem` that ended this attempt, where one did.

    An attempt that ended without a problem (the worker was asked to stop) does not count against the search. A search
    that is to be cancelled is cancelled instead. Raises LeaseLost.
    """
    with engine.begin() as connection:
        if hold(connection, claim).cancel_requested:
            _finish(connection, claim.search_id, "cancelled")
            return
        outcome = {"error": problem} if problem else {"max_attempts": SearchRow.max_attempts + 1}
        _write(connection, claim, state="queued", owner=None, lease_until=None, **outcome)
        append(connection, claim.search_id, "state", {"state": "queued"})
        notify(connection, QUEUE, claim.search_id)
        if problem:
            tallies.add(connection, "attempts_failed", "", 1)


def cancel(engine: Engine, search_id: int) -> State:
    """Ask for the end of a search; its state afterwards.

    A search that nobody works on is cancelled at once; the worker of a running one is notified, and learns it at its
    next heartbeat at the latest; a finished one stays as it is. Raises NotFound.
    """
    this = SearchRow.id == search_id
    query = select(SearchRow.state, _due().label("due")).where(this).with_for_update(key_share=True)
    with engine.begin() as connection:
        row = connection.execute(query).first()
        if row is None:
            raise NotFound(f"there is no search {search_id}")
        if row.due:
            _finish(connection, search_id, "cancelled", cancel_requested=True)
            return "cancelled"
        if row.state == "running":
            connection.execute(update(SearchRow).where(this).values(cancel_requested=True))
            notify(connection, EVENTS, search_id)
            notify(connection, CANCEL, search_id)
        state: State = row.state
        return state


def hold(connection: Connection, claim: Claim) -> Row[bool, str | None, int, int]:
    """Lock the claimed search for the rest of the transaction; its cancel_requested, stage, done and total.

    Raises LeaseLost.
    """
    query = select(SearchRow.cancel_requested, SearchRow.stage, SearchRow.done, SearchRow.total).where(_fence(claim))
    row = connection.execute(query.with_for_update(key_share=True)).first()
    if row is None:
        raise LeaseLost(claim)
    return row


def _is(state: State) -> ColumnElement[bool]:
    # Spelled out in the statement: a bound parameter would hide from the planner that the partial index holds.
    return SearchRow.state == literal(state, literal_execute=True)


def _due() -> ColumnElement[bool]:
    return or_(_is("queued"), and_(_is("running"), SearchRow.lease_until < func.now()))


def _spent() -> ColumnElement[bool]:
    return or_(SearchRow.cancel_requested, SearchRow.attempt >= SearchRow.max_attempts)


def _fence(claim: Claim) -> ColumnElement[bool]:
    return and_(
        SearchRow.id == claim.search_id,
        SearchRow.attempt == claim.attempt,
        SearchRow.owner == claim.owner,
        SearchRow.state == "running",
    )


def _write(connection: Connection, claim: Claim, **values: Any) -> Row[bool]:
    statement = update(SearchRow).where(_fence(claim)).values(**values).returning(SearchRow.cancel_requested)
    row = connection.execute(statement).first()
    if row is None:
        raise LeaseLost(claim)
    return row


def _finish(connection: Connection, search_id: int, state: State, **values: Any) -> None:
    """Close a search whose row this transaction has locked."""
    final = {"state": state, "lease_until": None, "finished_at": func.now(), **values}
    connection.execute(update(SearchRow).where(SearchRow.id == search_id).values(**final))
    append(connection, search_id, "state", {"state": state})
    tallies.add(connection, "searches_finished", state, 1)


def _settle(connection: Connection) -> None:
    """Finish the due searches that must not run again."""
    rows = connection.execute(spent()).all()
    died = sum(row.state == "running" for row in rows)
    if died:
        tallies.add(connection, "attempts_failed", "", died)
    for row in rows:
        if row.cancel_requested:
            _finish(connection, row.id, "cancelled")
            continue
        reason = row.error["detail"] if row.error else "every worker stopped without a word; was it out of memory?"
        problem = AttemptsExhausted(
            f"{row.attempt} attempts ended before the search did; last reason: {reason}"
        ).problem()
        _finish(connection, row.id, "failed", error=problem | ({"last_error": row.error} if row.error else {}))


def spent() -> Select[int, str, bool, int, Json | None]:
    """The due searches that must not run again, locked: first those to cancel, as their tallies are in this order."""
    columns = SearchRow.id, SearchRow.state, SearchRow.cancel_requested, SearchRow.attempt, SearchRow.error
    query = select(*columns).where(_due(), _spent()).order_by(SearchRow.cancel_requested.desc(), SearchRow.id)
    return query.with_for_update(skip_locked=True)
