"""A worker's signs of life: in the background the lease of its search is renewed, and a cancel is heard at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from db import queue
from db.errors import DatabaseUnavailable
from db.logs import search_id
from db.notify import CANCEL, Listener
from db.retry import is_passing
from db.workers import seen
from workers.gpus import gpu_use
from workers.stopping import Cancelled

log = logging.getLogger(__name__)

RENEW_SECONDS = 1.0
"""Between two renewals, each of which also asks whether the search is to be cancelled."""

SEEN_SECONDS = 5.0
"""Between two signs of life of the worker."""

LISTEN_SECONDS = 0.2
"""Between two looks whether there is a search to care for, or none any more."""

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""That of Linux goes on while the machine sleeps."""


class Held:
    """A claim that is renewed; `check` raises what was learnt of it: Cancelled or queue.LeaseLost."""

    def __init__(self, engine: Engine, claim: queue.Claim, lease: timedelta) -> None:
        self.claim = claim
        self._engine, self._lease = engine, lease
        self._learnt: Exception | None = None
        self._renewed = time.clock_gettime(CLOCK)

    @property
    def is_due(self) -> bool:
        """Whether it is time to renew."""
        return self._age() > min(RENEW_SECONDS, self._lease.total_seconds() / 3)

    def check(self) -> None:
        """Raise what was learnt. Who was stalled past the lease learns first whether it still holds."""
        if self._learnt is None and self._age() > self._lease.total_seconds():
            try:
                self.renew()
            except (DBAPIError, DatabaseUnavailable) as error:
                # Nothing can be written either: the fence is still to come.
                if not is_passing(error):
                    raise
        if self._learnt is not None:
            raise self._learnt

    def renew(self) -> None:
        """Renew the lease. Raises what the database raises."""
        began = time.clock_gettime(CLOCK)
        try:
            if queue.heartbeat(self._engine, self.claim, self._lease):
                self._learnt = Cancelled()
        except queue.LeaseLost as lost:
            self._learnt = lost
        self._renewed = began

    def _age(self) -> float:
        return time.clock_gettime(CLOCK) - self._renewed


class Heartbeat:
    """The thread that says a worker is alive, with so many evaluators, and cares for the search that it holds."""

    def __init__(self, engine: Engine, owner: str, lease: timedelta, evaluators: Callable[[], int]) -> None:
        self._engine, self._owner, self._lease, self._evaluators = engine, owner, lease, evaluators
        self._held: Held | None = None
        self._seen = -SEEN_SECONDS
        self._over = Event()
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def holding(self, claim: queue.Claim) -> Iterator[Held]:
        """Care for a claim meanwhile."""
        self._held = held = Held(self._engine, claim, self._lease)
        try:
            yield held
        finally:
            self._held = None

    def _beat(self) -> None:
        while not self._over.is_set():
            try:
                with Listener(self._engine, CANCEL) as listener:
                    while not self._over.is_set():
                        self._care(listener.wait(LISTEN_SECONDS))
            except (DBAPIError, DatabaseUnavailable) as error:
                log.warning("no heartbeat: %s", str(error).splitlines()[0])
                self._over.wait(LISTEN_SECONDS)
            except Exception:
                log.exception("no heartbeat")
                self._over.wait(RENEW_SECONDS)

    def _care(self, cancelled: set[int]) -> None:
        held, now = self._held, time.monotonic()
        search_id.set(held.claim.search_id if held else None)
        if held is not None and (held.is_due or held.claim.search_id in cancelled):
            held.renew()
        if now - self._seen >= SEEN_SECONDS:
            seen(self._engine, self._owner, self._evaluators(), gpu_use())
            self._seen = now
