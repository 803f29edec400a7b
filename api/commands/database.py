"""The database, for commands that need it and no running service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine


@contextmanager
def database() -> Iterator[Engine]:
    """An engine with the schema in place. Raises DatabaseUnavailable when there is no database."""
    # Not above: --help, completion and what asks the service need not wait for SQLAlchemy.
    from db.engine import connect, migrate

    engine = connect()
    try:
        migrate(engine)
        yield engine
    finally:
        engine.dispose()
