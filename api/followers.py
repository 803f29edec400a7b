"""Whoever follows a search is woken when it has news, and all who follow it share what is read of them.

One listening connection serves all streams; a stream holds no thread and no connection while it waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine

from api.errors import TooManyStreams
from db.engine import NETWORK
from db.events import Event, events_after
from db.notify import EVENTS, search_of

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 1.0
# A notification may be lost on its way; followers look by themselves this often.
POLL_SECONDS = 15.0
# A stream without news looks this often whether its key is still in force; see `api.keyring.REMEMBER_SECONDS`.
WAIT_SECONDS = 3.0
BATCH = 500
MOST_RECENT = 2 * BATCH
RETRY_SECONDS = 10


class Followers:
    """The open event streams of this process, at most `most`. `listen` runs as a task, as long as the application."""

    def __init__(self, engine: Engine, most: int) -> None:
        self.open = 0
        self._most = most
        self._engine = engine
        self._tails: dict[int, Tail] = {}

    async def listen(self) -> None:
        """Turn notifications into wake-ups until cancelled; connects again when the database was away."""
        conninfo = self._engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        while True:
            try:
                connection = await psycopg.AsyncConnection.connect(conninfo, autocommit=True, **NETWORK)  # type: ignore[arg-type]
                async with connection:
                    await connection.execute(f"LISTEN {EVENTS}")
                    for tail in self._tails.values():
                        # What happened while nobody listened.
                        tail.wake()
                    async for notification in connection.notifies():
                        followed = self._tails.get(search_of(notification.payload) or 0)
                        if followed is not None:
                            followed.wake()
            except psycopg.Error as error:
                logger.info("not listening for events: %s", error)
            except Exception:
                # Streams would be late for ever, and nobody would know why.
                logger.exception("not listening for events")
            await asyncio.sleep(RECONNECT_SECONDS)

    @contextmanager
    def follow(self, search_id: int) -> Iterator[Tail]:
        """The news of a search, for one more stream. Raises TooManyStreams."""
        if self.open >= self._most:
            raise TooManyStreams(
                f"{self.open} event streams are open in this process, as many as it holds; try again later",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        tail = self._tails.setdefault(search_id, Tail(self._engine, search_id))
        self.open += 1
        tail.followers += 1
        try:
            yield tail
        finally:
            self.open -= 1
            tail.followers -= 1
            if not tail.followers:
                del self._tails[search_id]


class Tail:
    """The latest events of a search, each read once for all who follow it."""

    def __init__(self, engine: Engine, search_id: int) -> None:
        self.followers = 0
        self.news = asyncio.Event()
        """Set at the next news; then another takes its place."""
        self._engine = engine
        self._search_id = search_id
        self._reading = asyncio.Lock()
        self._stale = True
        self._read_at = 0.0
        self._recent: list[Event] = []
        # All events later than this one, up to the last that was read, are in `_recent`.
        self._base: int | None = None

    def wake(self) -> None:
        """The search has news, or may have."""
        news, self.news, self._stale = self.news, asyncio.Event(), True
        news.set()

    async def after(self, seen: int) -> list[Event]:
        """The next events later than `seen`, oldest first; empty when there are none now."""
        if self._base is not None and seen >= self._base:
            async with self._reading:
                if self._stale:
                    await self._read_on()
            # What was read may have pushed out what this follower has not seen.
            if seen >= self._base:
                return [event for event in self._recent if event.id > seen]
        events = await self._read(seen)
        if self._base is None and events:
            self._base = events[-1].id
        return events

    async def wait(self, news: asyncio.Event) -> None:
        """Wait for `news`, at most `WAIT_SECONDS`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_SECONDS):
                await news.wait()
        if not news.is_set() and time.monotonic() > self._read_at + POLL_SECONDS / 2:
            self._stale = True

    async def _read_on(self) -> None:
        assert self._base is not None
        last = self._recent[-1].id if self._recent else self._base
        # What is told while we read makes this stale again.
        self._stale, self._read_at = False, time.monotonic()
        try:
            fresh = await self._read(last)
        except BaseException:
            self._stale = True
            raise
        self._stale = self._stale or len(fresh) == BATCH
        self._recent += fresh
        for dropped in self._recent[:-MOST_RECENT]:
            self._base = dropped.id
        self._recent = self._recent[-MOST_RECENT:]

    async def _read(self, after: int) -> list[Event]:
        return await run_in_threadpool(events_after, self._engine, self._search_id, after, BATCH)
