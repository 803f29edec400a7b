"""LISTEN and NOTIFY: waking who waits for a queued search, for an event, or for a cancel."""

from __future__ import annotations

import re
from types import TracebackType

import psycopg
from sqlalchemy import Connection, Engine, func, select, text

from db.errors import DatabaseUnavailable

QUEUE = "bitfrontier_queue"
EVENTS = "bitfrontier_events"
CANCEL = "bitfrontier_cancel"

_NUMBER = re.compile(r"[0-9]{1,19}")


def notify(connection: Connection, channel: str, search_id: int) -> None:
    """Wake the listeners of `channel` when this transaction commits."""
    connection.execute(select(func.pg_notify(channel, str(search_id))))


def search_of(payload: str) -> int | None:
    """The search that a notification came for; None for what others say on our channels."""
    # What raised while psycopg hands notifications out would leave the connection locked for ever.
    return int(payload) if _NUMBER.fullmatch(payload) else None


class Listener:
    """Hears a channel from the moment it is entered, on a connection outside the pool: waiting starves nobody.

    Enter it, then look for what is already there, then wait: nothing is slept through.
    """

    def __init__(self, engine: Engine, channel: str) -> None:
        self._engine, self._channel = engine, channel

    def __enter__(self) -> Listener:
        self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            self._driver: psycopg.Connection = self._connection.connection.driver_connection  # type: ignore[assignment]
            self._connection.detach()
            self._connection.execute(text(f"LISTEN {self._channel}"))
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def wait(self, timeout: float) -> set[int]:
        """The searches that notifications came for; none after `timeout` seconds without.

        Raises DatabaseUnavailable when the connection is lost.
        """
        try:
            heard = list(self._driver.notifies(timeout=timeout, stop_after=1))
        except psycopg.OperationalError as error:
            self._connection.invalidate()  # else closing it would try to roll back, and fail with less to say
            raise DatabaseUnavailable(f"the database went away while it was listened to: {error}") from error
        return {search_id for one in heard if (search_id := search_of(one.payload)) is not None}
