"""Waking who waits: at once, from the moment of entering, and never for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from sqlalchemy import Engine, func, select, text

from db import queue
from db.errors import DatabaseUnavailable
from db.events import tell
from db.notify import CANCEL, EVENTS, QUEUE, Listener, notify
from db.queue import Claim
from db.searches import Search, create_search
from tests.aside import PATIENCE, wait_until
from tests.db.conftest import LEASE, request_for, taken


def later(function: Callable[..., object], *arguments: object) -> None:
    """Call it while somebody waits already."""
    timer = threading.Timer(0.2, function, arguments)
    timer.daemon = True
    timer.start()


def test_a_new_search_wakes_who_waits_for_work(engine: Engine) -> None:
    with Listener(engine, QUEUE) as listener:
        later(create_search, engine, request_for())
        assert listener.wait(PATIENCE) == {1}


def test_a_search_that_is_given_back_wakes_who_waits_for_work(engine: Engine, claim: Claim) -> None:
    with Listener(engine, QUEUE) as listener:
        queue.release(engine, claim)
        assert listener.wait(PATIENCE) == {claim.search_id}


def test_a_cancel_wakes_the_worker(engine: Engine, claim: Claim) -> None:
    with Listener(engine, CANCEL) as listener:
        queue.cancel(engine, claim.search_id)
        assert listener.wait(PATIENCE) == {claim.search_id}


def test_what_is_told_wakes_followers_once(engine: Engine, claim: Claim) -> None:
    with Listener(engine, EVENTS) as listener:
        for _ in range(2):
            tell(engine, claim, "notice", {}, "once")
        assert listener.wait(PATIENCE) == {claim.search_id}
        assert listener.wait(0.1) == set()


def test_what_happens_between_two_waits_is_heard(engine: Engine, queued: Search) -> None:
    with Listener(engine, EVENTS) as listener:
        assert listener.wait(0) == set()
        claim = taken(engine)
        assert listener.wait(PATIENCE) == {queued.id}
        queue.progress(engine, claim, "measure", 0, 1)
        assert listener.wait(PATIENCE) == {queued.id}


def test_waiting_ends_at_the_timeout(engine: Engine) -> None:
    with Listener(engine, QUEUE) as listener:
        began = time.monotonic()
        assert listener.wait(0.2) == set()
        assert time.monotonic() - began > 0.15


def test_a_connection_that_is_lost_meanwhile_is_a_database_that_is_away(engine: Engine) -> None:
    def end() -> None:
        listening = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE left(query, 6) = 'LISTEN'"
        with engine.begin() as connection:
            connection.execute(text(listening))

    with Listener(engine, QUEUE) as listener:
        later(end)
        with pytest.raises(DatabaseUnavailable, match="went away"):
            listener.wait(PATIENCE)


@pytest.mark.parametrize("channel", [QUEUE, EVENTS, CANCEL])
def test_what_others_say_on_our_channels_is_passed_over(engine: Engine, channel: str) -> None:
    with Listener(engine, channel) as listener:
        with engine.begin() as connection:
            for payload in ("x", "", "-1", "1.5", "٣", "9" * 5000):
                connection.execute(select(func.pg_notify(channel, payload)))
            notify(connection, channel, 7)
        heard: set[int] = set()
        wait_until(lambda: heard.update(listener.wait(5)) or heard)
        assert heard == {7}


def test_many_listeners_leave_the_pool_to_others(engine: Engine) -> None:
    with ExitStack() as stack:
        for _ in range(25):
            stack.enter_context(Listener(engine, QUEUE))
        assert queue.claim(engine, "one", LEASE) is None
