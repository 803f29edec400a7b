"""The worker processes: who is at work, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import TypedDict

from sqlalchemy import Engine, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from db.tables import WorkerRow

FORGOTTEN = timedelta(days=1)
"""Workers that were killed sign out of nothing; they are forgotten after so long."""


class Gpu(TypedDict):
    """A GPU as it is used; `utilisation` is a share from 0 to 1, None where the driver does not say."""

    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilisation: float | None


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process under its owner string, which is unique per process life."""

    owner: str
    host: str
    pid: int
    version: str
    started_at: datetime
    seen_at: datetime
    evaluators: int
    gpus: list[Gpu]


def sign_in(engine: Engine, owner: str, *, host: str, pid: int, version: str) -> None:
    """Say that a worker has started, and forget those that were silent for a day."""
    row = insert(WorkerRow).values(owner=owner, host=host, pid=pid, version=version)
    with engine.begin() as connection:
        connection.execute(delete(WorkerRow).where(WorkerRow.seen_at < func.now() - FORGOTTEN))
        connection.execute(row.on_conflict_do_nothing())


def seen(engine: Engine, owner: str, evaluators: int, gpus: Sequence[Gpu]) -> None:
    """Say that a worker is alive, with so many evaluators ready on these GPUs."""
    row = update(WorkerRow).where(WorkerRow.owner == owner)
    with engine.begin() as connection:
        connection.execute(row.values(seen_at=func.now(), evaluators=evaluators, gpus=list(gpus)))


def sign_out(engine: Engine, owner: str) -> None:
    """Say that a worker has stopped."""
    with engine.begin() as connection:
        connection.execute(delete(WorkerRow).where(WorkerRow.owner == owner))


def live_workers(engine: Engine, within: timedelta) -> list[Worker]:
    """The workers that were seen `within` this time, by owner."""
    columns = [WorkerRow.__table__.c[field.name] for field in fields(Worker)]
    query = select(*columns).where(WorkerRow.seen_at > func.now() - within).order_by(WorkerRow.owner)
    with engine.connect() as connection:
        return [Worker(*row) for row in connection.execute(query)]
