"""API keys: a token that is shown once and kept as its digest, with what it may do and how much."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine, Row, Select, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError

from db.grants import MAX_OPEN, RATE_PER_MINUTE, SCOPES
from db.tables import ApiKeyRow
from search.errors import Conflict, InvalidRequest, NotFound

PREFIX = "bf_"


@dataclass(frozen=True, slots=True)
class Key:
    """Who asks: `max_open` unfinished searches and `rate_per_minute` requests are allowed.

    `last_used_at` is exact to the minute.
    """

    id: int
    name: str
    scopes: frozenset[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    max_open: int
    rate_per_minute: int


def create_key(
    engine: Engine,
    name: str,
    scopes: Collection[str],
    *,
    expires: timedelta | None = None,
    max_open: int = MAX_OPEN,
    rate_per_minute: int = RATE_PER_MINUTE,
) -> tuple[Key, str]:
    """A new key and its token, which is stored nowhere.

    Raises Conflict when there is, or was, a key of this name, InvalidRequest for a name, scope, time or limit that is
    not accepted.
    """
    _check(name, scopes, expires, {"max_open": max_open, "rate_per_minute": rate_per_minute})
    token = PREFIX + secrets.token_urlsafe(32)
    row = insert(ApiKeyRow).values(
        name=name,
        digest=_digest(token),
        scopes=sorted(set(scopes)),
        expires_at=None if expires is None else func.now() + expires,
        max_open=max_open,
        rate_per_minute=rate_per_minute,
    )
    row = row.on_conflict_do_nothing(index_elements=[ApiKeyRow.name])
    with engine.begin() as connection:
        if connection.execute(row.returning(ApiKeyRow.id)).first() is None:
            raise Conflict(
                f"there is a key '{name}' already, or was one that is revoked",
                field="name",
                value=name,
                accepted="a name that no key has had",
            )
        return _key(connection.execute(_query().where(ApiKeyRow.name == name)).one()), token


def find_key(engine: Engine, token: str) -> Key | None:
    """The key of a token; None when it is unknown, revoked or expired."""
    stale = or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < func.now() - timedelta(minutes=1))
    valid = (
        ApiKeyRow.digest == _digest(token),
        ApiKeyRow.revoked_at.is_(None),
        or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > func.now()),
    )
    with engine.connect() as connection:
        row = connection.execute(_query().add_columns(stale.label("stale")).where(*valid)).first()
    if row is None:
        return None
    if row.stale:
        used = update(ApiKeyRow).where(ApiKeyRow.id == row.id, stale).values(last_used_at=func.now())
        # When the disk is full, who only reads is still let in.
        with suppress(OperationalError), engine.begin() as connection:
            connection.execute(used)
    return _key(row)


def list_keys(engine: Engine) -> list[Key]:
    """All keys, by name, the revoked and the expired ones too."""
    with engine.connect() as connection:
        return [_key(row) for row in connection.execute(_query().order_by(ApiKeyRow.name))]


def revoke_key(engine: Engine, name: str) -> None:
    """Refuse the key of this name from now on. Raises NotFound."""
    revoked = update(ApiKeyRow).where(ApiKeyRow.name == name)
    revoked = revoked.values(revoked_at=func.coalesce(ApiKeyRow.revoked_at, func.now()))
    with engine.begin() as connection:
        if connection.execute(revoked.returning(ApiKeyRow.id)).first() is None:
            raise NotFound(f"there is no key '{name}'", field="name", value=name)


def any_keys(engine: Engine) -> bool:
    """Whether any key was ever created."""
    with engine.connect() as connection:
        return connection.execute(select(ApiKeyRow.id).limit(1)).first() is not None


def _digest(token: str) -> str:
    """A fast hash is right: a token has 256 random bits, which nobody guesses however fast they try."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _check(name: str, scopes: Collection[str], expires: timedelta | None, limits: dict[str, int]) -> None:
    if not name.strip() or len(name) > 100 or not name.isprintable():
        raise InvalidRequest(
            f"'{name[:100]}' cannot be the name of a key",
            field="name",
            value=name[:100],
            accepted="1 to 100 characters",
        )
    if not scopes or not set(scopes) <= set(SCOPES):
        raise InvalidRequest(
            f"a key cannot have the scopes {', '.join(scopes) or '(none)'}",
            field="scopes",
            value=sorted(scopes),
            accepted=list(SCOPES),
        )
    if expires is not None and not timedelta(0) < expires <= timedelta(days=36500):
        raise InvalidRequest(
            "a key must expire later, within a hundred years",
            field="expires",
            value=str(expires),
            accepted="a time from now on, or none",
        )
    for field, limit in limits.items():
        if not 1 <= limit < 2**31:
            raise InvalidRequest(
                f"{field} is {limit}; it must be at least 1", field=field, value=limit, accepted="a whole number from 1"
            )


def _query() -> Select[Any]:
    return select(*(ApiKeyRow.__table__.c[field.name] for field in fields(Key)))


def _key(row: Row[Any]) -> Key:
    values = {field.name: getattr(row, field.name) for field in fields(Key)}
    return Key(**values | {"scopes": frozenset(row.scopes)})
