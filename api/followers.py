"""Whoever follows a search is woken when it has news: one listening connection serves all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
from sqlalchemy import URL

from db.notify import EVENTS

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 1.0
# A notification can be lost while the listening connection is away; followers look by themselves this often.
POLL_SECONDS = 3.0


class Followers:
    """Wakes the followers of a search; `listen` runs as a task for the life of the application."""

    def __init__(self, url: URL) -> None:
        self._conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._waiting: dict[int, set[asyncio.Event]] = {}

    async def listen(self) -> None:
        """Turn notifications into wake-ups until cancelled; connects again when the database was away."""
        while True:
            try:
                connection = await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True)
                async with connection:
                    await connection.execute(f"LISTEN {EVENTS}")
                    async for notification in connection.notifies():
                        self._wake(notification.payload)
            except psycopg.Error as error:
                logger.info("not listening for events: %s", error)
            await asyncio.sleep(RECONNECT_SECONDS)

    @contextmanager
    def follow(self, search_id: int) -> Iterator[asyncio.Event]:
        """An event that is set whenever the search has news."""
        news = asyncio.Event()
        self._waiting.setdefault(search_id, set()).add(news)
        try:
            yield news
        finally:
            self._waiting[search_id].discard(news)
            if not self._waiting[search_id]:
                del self._waiting[search_id]

    def _wake(self, payload: str) -> None:
        for news in self._waiting.get(int(payload), ()):
            news.set()


async def wait(news: asyncio.Event) -> None:
    """Wait for news, at most `POLL_SECONDS`; clears the event."""
    with suppress(TimeoutError):
        await asyncio.wait_for(news.wait(), POLL_SECONDS)
    news.clear()
