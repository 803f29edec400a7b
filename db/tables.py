"""The tables. Reads and writes go through the functions of this package, which hand out frozen dataclasses."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import CheckConstraint, ForeignKey, Identity, Index, MetaData, Text, UniqueConstraint, func, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import BigInteger

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
            "ix": "%(table_name)s_%(column_0_name)s",
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
    key_id: Mapped[int | None] = mapped_column(ForeignKey("api_keys.id", ondelete="RESTRICT"))
    idempotency_key: Mapped[str | None]
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
        # Those that a claim must finish instead; nearly always empty.
        Index(
            "searches_spent",
            "id",
            postgresql_where=text("state IN ('queued', 'running') AND (cancel_requested OR attempt >= max_attempts)"),
        ),
        # What a key has open is counted under a lock: from an index as small as the quota.
        Index("searches_open", "key_id", postgresql_where=text("state IN ('queued', 'running')")),
        Index("searches_key_id_id", "key_id", "id"),
        Index("searches_state_id", "state", "id"),
        Index("searches_queued", "created_at", postgresql_where=text("state = 'queued'")),
        Index(
            "searches_idempotency",
            "key_id",
            "idempotency_key",
            unique=True,
            postgresql_nulls_not_distinct=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
    )


class EventRow(Base):
    """What happened to a search, in order; the id is the event id of the stream."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    search_id: Mapped[int] = mapped_column(ForeignKey("searches.id", ondelete="CASCADE"))
    kind: Mapped[str]
    data: Mapped[Json]
    once: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (Index("events_search_id_id", "search_id", "id"), UniqueConstraint("search_id", "once"))


class ResultRow(Base):
    """A finished computation under the SHA-256 of all it depends on; shared by all searches."""

    __tablename__ = "results"

    key: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    value: Mapped[Any] = mapped_column(JSONB)
    seconds: Mapped[float]
    search_id: Mapped[int | None] = mapped_column(ForeignKey("searches.id", ondelete="SET NULL"), index=True)
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


class ApiKeyRow(Base):
    """Who may ask: the digest of a token that was shown once."""

    __tablename__ = "api_keys"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    digest: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    max_open: Mapped[int]
    rate_per_minute: Mapped[int]

    __table_args__ = (CheckConstraint("scopes <@ ARRAY['read', 'write', 'admin']", name="scopes"),)


class WorkerRow(Base):
    """A worker process that is signed in, or was when it died."""

    __tablename__ = "workers"

    owner: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    version: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
    evaluators: Mapped[int] = mapped_column(server_default="0")
    gpus: Mapped[Any] = mapped_column(JSONB, server_default=text("'[]'::jsonb"))


class TallyRow(Base):
    """A counter that only rises."""

    __tablename__ = "tallies"

    name: Mapped[str] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]
