"""Insisting on a database call while the server is away. Whatever workers write is safe to write again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from db.errors import DatabaseUnavailable

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0

PASSING = frozenset(
    {
        "57P01",  # the server is shut down, or the connection was ended by an administrator
        "57P02",  # another process of the server crashed
        "57P03",  # the server is starting up
        "57014",  # an operator, or a time limit, ended the statement
        "55P03",  # a lock was not free
        "25006",  # the server only reads: another has taken its place
        "53100",  # the disk is full
        "53200",  # the server is out of memory
        "53300",  # too many connections
        "40001",  # rolled back for the sake of another transaction
        "40P01",  # of two that waited for each other this one was ended
    }
)
"""SQLSTATEs of errors that end by themselves, or by an operator's hand."""


def insist(function: Callable[[], T], *, seconds: float = 60.0, check: Callable[[], None] | None = None) -> T:
    """What `function` returns, called again with growing pauses, for about `seconds`, while the database is away.

    The answer to a commit may have been lost: `function` must be safe to repeat. `check` is called before every new
    try, and may raise to stop. Raises what `function` raised last.
    """
    deadline, pause = time.monotonic() + seconds, FIRST_PAUSE
    while True:
        try:
            return function()
        except (DBAPIError, DatabaseUnavailable) as error:
            if not is_passing(error) or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
        if check is not None:
            check()


def is_passing(error: Exception) -> bool:
    """Whether the same call may succeed later: the server was away, stopping, starting, or short of something."""
    if isinstance(error, DatabaseUnavailable):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code = getattr(error.orig, "sqlstate", None)
    if code is None:
        # It was not the server who spoke: there is none, or the connection to it broke.
        return error.connection_invalidated or isinstance(error, (OperationalError, InterfaceError))
    return error.connection_invalidated or code in PASSING or code.startswith("08")
