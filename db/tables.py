"""The tables. Reads and writes go through the functions of this package, which hand out frozen dataclasses."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Literal

from sqlalchemy import CheckConstraint, ForeignKey, Identity, Index, MetaData, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import BigInteger

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Stage = Literal["profile", "sensitivity", "baselines", "optimize", "measure", "refine", "evolve", "accept"]

Json = dict[str, Any]
Time = TIMESTAMP(timezone=True)


class Base(DeclarativeBase):
    """Naming and column types shared by all tables."""

    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "uq": "%(table_name)s_%(column_0_name)s_key",
            "ck": "%(table_name)s_%(constraint_name)s_check",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {str: Text, datetime: Time, Json: JSONB(none_as_null=True)}


class SearchRow(Base):
    """One request from POST to frontier, and the queue that workers claim from."""

    __tablename__ = "searches"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    state: Mapped[str] = mapped_column(server_default="queued")
    stage: Mapped[str | None]
    done: Mapped[int] = mapped_column(server_default="0")
    total: Mapped[int] = mapped_column(server_default="0")
    request: Mapped[Json]
    model: Mapped[str]
    target: Mapped[str]
    priority: Mapped[int] = mapped_column(server_default="0")
    attempt: Mapped[int] = mapped_column(server_default="0")
    max_attempts: Mapped[int] = mapped_column(server_default="3")
    owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(server_default=text("false"))
    error: Mapped[Json | None]
    summary: Mapped[Json | None]
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    body_digest: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"),
        CheckConstraint(
            "stage IN ('profile', 'sensitivity', 'baselines', 'optimize', 'measure', 'refine', 'evolve', 'accept')",
            name="stage",
        ),
        # The claim reads this index in its order and stops at the first row: finished searches cost it nothing.
        Index(
            "searches_unfinished",
            priority.desc(),
            id,
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
    )


class EventRow(Base):
    """What happened to a search, in order; the id is the event id of the stream."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    search_id: Mapped[int] = mapped_column(ForeignKey("searches.id", ondelete="CASCADE"))
    kind: Mapped[str]
    data: Mapped[Json]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (Index("events_search_id_id", "search_id", "id"),)


class ResultRow(Base):
    """A finished computation under the SHA-256 of all it depends on; shared by all searches."""

    __tablename__ = "results"

    key: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    value: Mapped[Any] = mapped_column(JSONB)
    seconds: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class CandidateRow(Base):
    """A candidate of a search under its number."""

    __tablename__ = "candidates"

    search_id: Mapped[int] = mapped_column(ForeignKey("searches.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    source: Mapped[str]
    label: Mapped[str]
    allocation: Mapped[Json]
    predicted: Mapped[Json]
    costs: Mapped[Json]
    expected: Mapped[Json] = mapped_column(server_default=text("'{}'::jsonb"))
    metrics: Mapped[Json]
    fits: Mapped[bool]
    on_frontier: Mapped[bool]
    shadow_prices: Mapped[Json] = mapped_column(server_default=text("'{}'::jsonb"))


class ModelRow(Base):
    """A registered model: where it is loaded from and, once inspected, what it is made of."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    inventory: Mapped[Json | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class LatencyProfileRow(Base):
    """Measured kernel times of one device, under the digest of what was measured."""

    __tablename__ = "latency_profiles"

    key: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str]
    profile: Mapped[Json]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
