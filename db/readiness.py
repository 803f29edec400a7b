"""Whether the database answers, and has the schema that this version works on."""

from __future__ import annotations

import asyncio
import time
from functools import cache

import psycopg
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL

from db.errors import DatabaseUnavailable

SECONDS = 1.5
"""A database that does not answer within this is away."""
FRESH_SECONDS = 1.0


class Readiness:
    """Asks on a connection of its own: the pool may be waiting for a host that is gone.

    One question is asked at a time, and its answer holds for a second: asking often costs nothing.
    """

    def __init__(self, url: URL) -> None:
        self._conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._one_at_a_time = asyncio.Lock()
        self._asked = -FRESH_SECONDS
        self.reason: str | None = None
        """Why the database could not be worked with when it was asked last; None when it could."""

    async def check(self) -> None:
        """Raise DatabaseUnavailable, with the reason, unless the database can be worked with."""
        async with self._one_at_a_time:
            if time.monotonic() > self._asked + FRESH_SECONDS:
                self.reason = await self._ask()
                self._asked = time.monotonic()
        if self.reason:
            raise DatabaseUnavailable(self.reason)

    async def _ask(self) -> str | None:
        try:
            async with asyncio.timeout(SECONDS):
                connection = await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True)
                async with connection:
                    cursor = await connection.execute("SELECT version_num FROM alembic_version")
                    row = await cursor.fetchone()
        except TimeoutError:
            return f"the database did not answer within {SECONDS:g} s"
        except psycopg.errors.UndefinedTable:
            row = None
        except psycopg.Error:
            # The driver's words name host and user; whoever asks need not have a key.
            return "the database does not answer"
        if row is None or row[0] in _older_revisions():
            return "the schema is older than this version needs; migrate the database"
        return None


@cache
def _older_revisions() -> frozenset[str]:
    """The revisions before ours. One that is not known is newer: a newer version is taking over."""
    config = Config()
    config.set_main_option("script_location", "db:migrations")
    script = ScriptDirectory.from_config(config)
    return frozenset(found.revision for found in script.walk_revisions()) - set(script.get_heads())
