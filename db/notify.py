"""LISTEN and NOTIFY: waking who waits for a queued search or for an event."""

from __future__ import annotations

import time

from sqlalchemy import Connection, Engine, Select, func, select, text

QUEUE = "bitfrontier_queue"
EVENTS = "bitfrontier_events"


def notify(connection: Connection, channel: str, search_id: int) -> None:
    """Wake the listeners of `channel` when this transaction commits."""
    connection.execute(select(func.pg_notify(channel, str(search_id))))


def listen(
    engine: Engine, channel: str, timeout: float, *, search_id: int | None = None, unless: Select[int] | None
) -> None:
    """Return at the next notification (for `search_id`, where given), or after `timeout` seconds.

    `unless` is asked once listening has begun: a row that is already there ends the wait at once, so that nothing
    which happened before can be slept through. The connection is taken out of the pool: waiting starves nobody.
    """
    deadline = time.monotonic() + timeout
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        connection.detach()
        connection.execute(text(f"LISTEN {channel}"))
        if unless is not None and connection.execute(unless.limit(1)).first() is not None:
            return
        for notification in driver.notifies(timeout=deadline - time.monotonic()):
            if search_id is None or notification.payload == str(search_id):
                return
