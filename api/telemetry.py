"""What `/metrics` tells Prometheus: of the store, which all processes share, and of this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from typing import cast, get_args

from fastapi.concurrency import run_in_threadpool
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy import Engine
from starlette.types import Scope

from api.followers import Followers
from api.problems import AWAY
from db import tallies
from db.errors import DatabaseUnavailable
from db.readiness import Readiness
from db.searches import count_by_state, oldest_queued_seconds
from db.states import State
from db.workers import live_workers

logger = logging.getLogger(__name__)

LIVE = timedelta(minutes=1)
"""A worker that was not seen for longer counts as gone."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

COUNTERS: dict[tallies.Tally, tuple[str, str]] = {
    "results_computed": ("kind", "Results computed: sensitivity tables, measurements, latency profiles"),
    "results_reused": ("kind", "Results that another search had computed"),
    "searches_finished": ("state", "Searches that ended"),
    "attempts_failed": ("", "Attempts at a search that ended before it did"),
}
"""Tally → its label, and what it counts."""


class Telemetry(Collector):
    """The registry of this process, and the collector that asks the store at each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "bitfrontier_http_request_seconds",
            "Time to the first byte of an answer",
            ("method", "route", "status"),
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._engine: Engine | None = None
        self._followers: Followers | None = None
        self._readiness: Readiness | None = None
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def watch(self, engine: Engine, followers: Followers, readiness: Readiness) -> None:
        """Tell of this store and these event streams from now on; of the store only while it is ready."""
        self._engine, self._followers, self._readiness = engine, followers, readiness

    async def scrape(self, encode: Callable[[CollectorRegistry], bytes]) -> bytes:
        """All metrics, within seconds even when the database hangs."""
        if self._readiness is not None:
            with suppress(DatabaseUnavailable):
                await self._readiness.check()
        return await run_in_threadpool(encode, self.registry)

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request under the template of its route, so that no client makes up label values."""
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = getattr(scope.get("route"), "path", None) or "none"
        self._requests.labels(method, route, str(status)).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The metrics of the store; without its answer, only that it is away."""
        yield InfoMetricFamily("bitfrontier", "This process", {"version": version("bitfrontier")})
        if self._followers is not None:
            yield GaugeMetricFamily("bitfrontier_event_streams", "Open event streams", self._followers.open)
        families: list[Metric] = []
        if self._engine is not None and self._readiness is not None and self._readiness.reason is None:
            try:
                families = [*_searches(self._engine), *_tallies(self._engine), *_workers(self._engine)]
            except (*AWAY, DatabaseUnavailable) as error:
                logger.warning("no metrics of the store: %s", str(getattr(error, "orig", None) or error).strip())
        yield GaugeMetricFamily("bitfrontier_database_up", "Whether the database answers", 1 if families else 0)
        yield from families


def _searches(engine: Engine) -> Iterator[Metric]:
    states = GaugeMetricFamily("bitfrontier_searches", "Searches by state", labels=["state"])
    counts = count_by_state(engine)
    for state in get_args(State):
        states.add_metric([state], counts.get(state, 0))
    yield states
    yield GaugeMetricFamily(
        "bitfrontier_oldest_queued_seconds",
        "For how long the oldest queued search has been waiting",
        oldest_queued_seconds(engine),
    )


def _tallies(engine: Engine) -> Iterator[Metric]:
    values = tallies.read(engine)
    for name, (label, about) in COUNTERS.items():
        counter = CounterMetricFamily(f"bitfrontier_{name}", about, labels=[label] if label else [])
        known = {found: value for (tally, found), value in values.items() if tally == name}
        for found, value in (known or ({} if label else {"": 0.0})).items():
            counter.add_metric([found] if label else [], value)
        yield counter
    stages = SummaryMetricFamily("bitfrontier_stage_seconds", "Durations of finished stages", labels=["stage"])
    for (tally, stage), count in values.items():
        if tally == "stage_count":
            stages.add_metric([stage], count_value=int(count), sum_value=values["stage_seconds", stage])
    yield stages


GPU_GAUGES = {
    "memory_used_bytes": "GPU memory in use",
    "memory_total_bytes": "GPU memory",
    "utilisation": "Share of the time in which the GPU worked",
}
"""What a worker tells of a GPU, and what it is."""


def _workers(engine: Engine) -> Iterator[Metric]:
    live = live_workers(engine, LIVE)
    yield GaugeMetricFamily("bitfrontier_workers", "Worker processes at work", len(live))
    evaluators = GaugeMetricFamily("bitfrontier_evaluators", "Evaluators that are ready", labels=["worker"])
    for worker in live:
        evaluators.add_metric([worker.owner], worker.evaluators)
    yield evaluators
    for name, about in GPU_GAUGES.items():
        gauge = GaugeMetricFamily(f"bitfrontier_gpu_{name}", about, labels=["worker", "gpu", "name"])
        for worker in live:
            for place, gpu in enumerate(worker.gpus):
                value = cast(dict[str, float | None], gpu)[name]
                if value is not None:
                    gauge.add_metric([worker.owner, str(place), gpu["name"]], value)
        yield gauge
