"""The worker: claims one search at a time and works on it until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from threading import Event, current_thread, main_thread
from typing import Any

import torch
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from db import queue
from db.errors import DatabaseUnavailable
from db.logs import search_id
from db.notify import QUEUE, Listener
from db.retry import insist, is_passing
from db.workers import sign_in, sign_out
from search.errors import BitfrontierError
from workers.cluster import start_ray, stop_ray
from workers.evaluator import EvaluatorSpec
from workers.fingerprint import ModelChanged
from workers.heartbeat import Heartbeat, Held
from workers.pipeline import run_search
from workers.pools import Pool, open_pool
from workers.settings import grace, idle, lease, patience, pool_kind
from workers.stopping import Cancelled, Shutdown

log = logging.getLogger("bitfrontier.worker")

POLL_SECONDS = 2.0
"""Between two looks for a search while nothing wakes the worker."""

LOOK_SECONDS = 0.2
"""Between two looks whether to stop."""

LAST_SECONDS = 5.0
"""How long a worker that stops waits for a database that is away."""

FIRST_REST, LONGEST_REST = 1.0, 60.0
"""Seconds without a claim after an attempt that ended in an unexpected way, and after many in a row."""

DISK_FULL = "53100"


class Worker:
    """Claims one search at a time and works on it until told to stop. One pool is kept from search to search."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # A process id alone comes back: in a container all are the same.
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._stop = Event()
        self._stop_at = float("inf")
        self._interruptible = False
        self._pool: Pool | None = None
        self._idle_since = time.monotonic()
        self._begun: queue.Claim | None = None
        """What was last worked on: still ours, if the database went away over it."""
        self._uncertain = False
        """Whether the last answer of the database was lost."""
        self._rest = 0.0
        """Seconds until the next claim, where what went wrong may be this worker's own fault."""
        self._reason: dict[str, Any] | None = None
        """Why the search has to be handed back, where a person should know."""
        self._heartbeat = Heartbeat(engine, self.owner, lease(), self._evaluators)

    def stop(self) -> None:
        """Claim nothing more. What evaluators are at may be finished within the grace period, and the search is handed
        back; asked a second time, at once."""
        self._stop_at = time.monotonic() + (0 if self._stop.is_set() else grace())
        self._stop.set()

    def interrupt(self) -> None:
        """Stop at once, from the worker's own thread (a signal's handler): raises Shutdown where it is at work."""
        self.stop()
        self._stop_at = time.monotonic()
        if self._interruptible:
            self._interruptible = False
            raise Shutdown

    def run(self) -> None:
        """Work until stopped. A database or a cluster that is away is waited for."""
        self._insist(self._sign_in)
        try:
            with self._heartbeat:
                while not self._stop.is_set():
                    self._turn()
        finally:
            self._drop_pool()
            self._last(lambda: sign_out(self._engine, self.owner))

    def _sign_in(self) -> None:
        host, pid = socket.gethostname(), os.getpid()
        sign_in(self._engine, self.owner, host=host, pid=pid, version=version("bitfrontier"))

    def _turn(self) -> None:
        """Wait for a search and work on it; what ends this badly is told, and the worker goes on."""
        # A sick worker must not fail every search of the queue, while others could do them.
        if self._stop.wait(self._rest) or not self._is_ready():
            return
        try:
            claim = self._next()
            if claim is not None:
                self._work(claim)
        except queue.LeaseLost as lost:
            log.warning("%s", lost)
        except (DBAPIError, DatabaseUnavailable) as error:
            if not is_passing(error):
                raise
            self._uncertain = True
            log.warning("the database does not answer: %s", _first_line(error))
            self._stop.wait(POLL_SECONDS)

    def _is_ready(self) -> bool:
        """Join Ray, which takes seconds, before a search is claimed and not after."""
        try:
            prepare()
        except BitfrontierError:
            # How this worker was set up: waiting changes nothing.
            raise
        except Exception as error:
            log.warning("nothing can be evaluated: %s", _first_line(error))
            self._stop.wait(POLL_SECONDS)
            return False
        return True

    def _next(self) -> queue.Claim | None:
        """The next claim; None when the worker was asked to stop meanwhile."""
        if self._uncertain:
            found = queue.recover(self._engine, self.owner)
            if found is not None and found == self._begun:
                queue.release(self._engine, found, self._reason)
                found = None
            self._uncertain, self._reason = False, None
            if found is not None:
                return found
        claim = self._claim()
        if claim is not None:
            return claim
        self._idle_since = time.monotonic()
        with Listener(self._engine, QUEUE) as listener:
            while not self._stop.is_set():
                claim = self._claim()
                if claim is not None:
                    return claim
                self._wait(listener)
        return None

    def _claim(self) -> queue.Claim | None:
        # Whatever happens, the claim may have been committed.
        self._uncertain = True
        claim = queue.claim(self._engine, self.owner, lease())
        self._uncertain = False
        return claim

    def _wait(self, listener: Listener) -> None:
        """Until a search may be due; without one for long, the evaluators go."""
        deadline = time.monotonic() + POLL_SECONDS
        while time.monotonic() < deadline and not self._stop.is_set():
            if listener.wait(LOOK_SECONDS):
                return
            if self._pool is not None and self._pool.held and time.monotonic() - self._idle_since > idle():
                log.info("idle: the evaluators go")
                self._drop_pool()

    def _work(self, claim: queue.Claim) -> None:
        token = search_id.set(claim.search_id)
        self._begun = claim
        log.info("attempt %d begins", claim.attempt)
        try:
            with self._heartbeat.holding(claim) as held:
                self._attempt(claim, held)
        finally:
            search_id.reset(token)
            self._idle_since = time.monotonic()

    def _attempt(self, claim: queue.Claim, held: Held) -> None:
        """Work on a search, and say how that ended. Raises queue.LeaseLost, after which nothing is written, and what
        the database raises when it stays away."""

        def check() -> None:
            held.check()
            if time.monotonic() > self._stop_at:
                raise Shutdown

        try:
            self._interruptible = True
            run_search(self._engine, claim, self._pool_for, check, lambda: not self._stop.is_set())
            self._interruptible = False
            self._rest = 0.0
            log.info("succeeded")
        except queue.LeaseLost:
            raise
        except Cancelled:
            log.info("cancelled")
            self._insist(lambda: queue.cancelled(self._engine, claim), held)
        except Shutdown:
            log.info("handed back: this worker stops")
            self._last(lambda: queue.release(self._engine, claim))
        except Exception as error:
            self._end_badly(claim, held, error)
        finally:
            self._interruptible = False

    def _end_badly(self, claim: queue.Claim, held: Held, error: Exception) -> None:
        """Fail a search for a reason that will not go away; hand it back for any other."""
        if isinstance(error, DBAPIError | DatabaseUnavailable) and is_passing(error):
            self._reason = _disk_full(error)
            raise error
        if isinstance(error, BitfrontierError):
            log.warning("failed: %s", error.detail)
            if error.status >= 500:
                self._fall_ill()
            if isinstance(error, ModelChanged):
                # Who has which files is not known.
                self._drop_pool()
            problem = without_paths(error.problem())
            self._insist(lambda: queue.fail(self._engine, claim, problem), held)
            return
        log.exception("attempt %d ended", claim.attempt)
        self._fall_ill()
        if type(error).__module__.startswith("ray."):
            stop_ray()
        problem = without_paths(BitfrontierError(reason(error)).problem())
        self._insist(lambda: queue.release(self._engine, claim, problem), held)

    def _fall_ill(self) -> None:
        """Build the evaluators anew for the next search, and leave that to others for a while."""
        self._drop_pool()
        self._rest = min(max(2 * self._rest, FIRST_REST), LONGEST_REST)

    def _insist(self, function: Callable[[], object], held: Held | None = None) -> None:
        def check() -> None:
            if time.monotonic() > self._stop_at:
                raise DatabaseUnavailable("the database is away, and this worker stops")
            if held is not None:
                # The end is being written: that it is wanted changes nothing.
                with contextlib.suppress(Cancelled):
                    held.check()

        insist(function, seconds=patience(), check=check)

    def _last(self, function: Callable[[], object]) -> None:
        """What is written when the worker stops; without it, the lease runs out."""
        try:
            insist(function, seconds=LAST_SECONDS)
        except queue.LeaseLost as lost:
            log.warning("%s", lost)
        except (DBAPIError, DatabaseUnavailable) as error:
            log.warning("not written at the end: %s", _first_line(error))

    def _pool_for(self, spec: EvaluatorSpec) -> Pool:
        if self._pool is None or self._pool.spec != spec:
            self._drop_pool()
            self._pool = open_pool(spec)
        return self._pool

    def _drop_pool(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                pool.close()
            except Exception as error:
                log.warning("the evaluators were gone already: %s", _first_line(error))

    def _evaluators(self) -> int:
        pool = self._pool
        return pool.held if pool is not None else 0


def prepare() -> None:
    """What takes seconds, and no search should wait for. Raises what `start_ray` raises."""
    if pool_kind() != "ray":
        return
    handler = signal.getsignal(signal.SIGTERM)
    start_ray()
    # Ray puts its own in our handler's place, which ends the process at once.
    if current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) is not handler:
        signal.signal(signal.SIGTERM, handler)


def reason(error: Exception) -> str:
    """Why an attempt ended, for a person."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"the worker ran out of memory: {_first_line(error)}; fewer or shorter calibration samples need less"
    return f"the worker failed unexpectedly ({type(error).__name__}: {_first_line(error)}); its log says more"


def without_paths(problem: dict[str, Any]) -> dict[str, Any]:
    """The problem with files named, but not where they are on this machine."""
    return problem | {"detail": re.sub(r"(?<![\w.:/])/(?:[^\s'\"/:,]+/)+", "", problem["detail"])}


def _disk_full(error: Exception) -> dict[str, Any] | None:
    if getattr(getattr(error, "orig", None), "sqlstate", None) != DISK_FULL:
        return None
    told = f"the disk of the database is full, and was not emptied in {patience():g} s"
    return DatabaseUnavailable(told).problem()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
