"""`make bench-service`: 200 clients on one API process and one Postgres, and what the service adds to a search."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.load.clients import Seen, run
from benchmarks.load.overhead import overheads
from benchmarks.load.service import Service, service
from benchmarks.report import table, write
from tests import models

CLIENTS = 200
CLIENT_PROCESSES = 2
SECONDS = 30.0
PAUSE_SECONDS = 2.0
SEARCHES = 10
KINDS = {
    "post": "post a search",
    "list": "list 20 searches",
    "show": "show a search",
    "follow": "follow: first event",
    "cancel": "cancel a search",
    "news": "cancelled: event at the follower",
}

ABOUT = f"""One API process and one Postgres on this machine, and beside them {CLIENTS} clients in {CLIENT_PROCESSES}
processes, which share its cores. Each client posts a search, lists 20, shows one, follows it and cancels it, over and
over, with an API key, a connection and an event stream of its own. Times are what the clients see."""


def main() -> None:
    """Measure, print, and write the dated result."""
    parts = [ABOUT]
    with tempfile.TemporaryDirectory(prefix="bitfrontier-load-models-") as folder:
        with service(Path(folder), CLIENTS) as found:
            _load(found, 5.0, PAUSE_SECONDS)
            for pause in (PAUSE_SECONDS, 0.0):
                parts += _report(found, pause)
        # A fresh database: what waits in the other one is not what is measured here.
        with service(Path(folder)) as found:
            measured = overheads(found, models.tiny_bert(Path(folder) / "tiny"), SEARCHES)
    first, last = zip(*measured, strict=True)
    rows: list[dict[str, object]] = [
        {"seconds": name, "median": statistics.median(values), "worst": max(values)}
        for name, values in (("POST to the first stage", first), ("last measurement to `succeeded`", last))
    ]
    parts += [
        "## What the service adds to a search",
        f"{SEARCHES} searches on a tiny BERT, one after the other, each on data of its own, by an idle worker on Ray.",
        table(rows),
        "Load average of the machine at the end (1, 5 and 15 minutes): "
        + ", ".join(f"{load:.1f}" for load in os.getloadavg()),
    ]
    write("service", "The service under load", "make bench-service", parts)


def _report(found: Service, pause: float) -> list[str]:
    before, memory = found.cpu_seconds(), _Memory(found)
    with memory:
        seen = _load(found, SECONDS, pause)
    used = {name: after - before[name] for name, after in found.cpu_seconds().items()} | {"clients": seen.cpu_seconds}
    requests = sum(len(seconds) for kind, seconds in seen.seconds.items() if kind != "news")
    rows: list[dict[str, object]] = [
        {
            "request": name,
            "number": len(seen.seconds[kind]),
            **{f"p{q} ms": 1000 * float(np.percentile(seen.seconds[kind], q)) for q in (50, 99)},
            "worst ms": 1000 * max(seen.seconds[kind]),
        }
        for kind, name in KINDS.items()
    ]
    how = f"about {pause:g} s between two requests of a client" if pause else "no pause: as much as goes"
    errors = "".join(f"; {count} × {what}" for what, count in seen.errors.most_common(5))
    cores = ", ".join(f"{name} {seconds / SECONDS:.0%}" for name, seconds in used.items())
    each = ", ".join(f"{name} {1000 * seconds / requests:.2f}" for name, seconds in used.items())
    return [
        f"## {CLIENTS} clients for {SECONDS:g} s, {how}",
        f"**{requests / SECONDS:.0f} requests/s, {sum(seen.errors.values())} errors**{errors}.",
        f"Memory of the API (MB): {memory.text()}. Use of a core: {cores}; milliseconds of it for a request: {each}.",
        table(rows),
    ]


def _load(found: Service, seconds: float, pause: float) -> Seen:
    together = Seen()
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(CLIENT_PROCESSES, mp_context=spawning) as processes:
        shares = [found.keys[share::CLIENT_PROCESSES] for share in range(CLIENT_PROCESSES)]
        began = [processes.submit(run, found.url, keys, seconds, pause) for keys in shares]
        for one in began:
            together.merge(one.result())
    return together


class _Memory:
    """Looks at the API's memory every second."""

    def __init__(self, found: Service) -> None:
        self._found, self._over, self._seen = found, threading.Event(), [found.memory()]
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()
        time.sleep(2)
        self._seen.append(self._found.memory())

    def text(self) -> str:
        """Before, halfway, at most, and two seconds after."""
        before, *during, after = self._seen
        halfway = during[len(during) // 2]
        return f"{before:.0f} before, {halfway:.0f} halfway, {max(during):.0f} at most, {after:.0f} after"

    def _look(self) -> None:
        while not self._over.wait(1):
            self._seen.append(self._found.memory())
