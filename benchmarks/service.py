"""Searches as the service runs them, in this process: embedded Postgres, a real worker, one evaluator."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("BITFRONTIER_POOL", "inprocess")
os.environ["BITFRONTIER_DATA"] = tempfile.mkdtemp(prefix="bitfrontier-benchmark-")
# As root, Postgres runs as another user, who must be able to enter.
Path(os.environ["BITFRONTIER_DATA"]).chmod(0o755)

from datetime import timedelta  # noqa: E402 -- the data folder is settled before anything reads it

from db import queue  # noqa: E402
from db.candidates import candidates  # noqa: E402
from db.engine import connect, migrate  # noqa: E402
from db.events import events_after  # noqa: E402
from db.searches import Search, create_search, get_search  # noqa: E402
from search.candidate import Candidate  # noqa: E402
from search.request import SearchRequest  # noqa: E402
from workers.evaluator import EvaluatorSpec  # noqa: E402
from workers.pipeline import run_search  # noqa: E402
from workers.pools import Pool, open_pool  # noqa: E402


@dataclass
class Finished:
    """A search with its candidates, the seconds it took and the seconds of each stage."""

    search: Search
    candidates: list[Candidate]
    seconds: float
    stages: dict[str, float]

    @property
    def best(self) -> Candidate:
        """The least measured loss that fits."""
        return min((one for one in self.candidates if one.fits), key=lambda one: one.loss or 0.0)


class Service:
    """Runs searches one after the other; evaluators of one spec are kept."""

    def __init__(self) -> None:
        self.engine = connect()
        migrate(self.engine)
        self._pool: Pool | None = None

    def search(self, **request: object) -> Finished:
        """Run one search to its end. Raises what the search raises."""
        created, _ = create_search(self.engine, SearchRequest.model_validate(request))
        began = time.monotonic()
        claim = queue.claim(self.engine, "benchmark", timedelta(hours=3))
        assert claim is not None
        run_search(self.engine, claim, self._pool_for, lambda: None)
        seconds = time.monotonic() - began
        events = events_after(self.engine, created.id, 0, limit=100_000)
        marks = [(event.data["stage"], event.created_at) for event in events if event.kind == "stage"]
        ends = [*(at for _, at in marks[1:]), events[-1].created_at]
        stages: dict[str, float] = {}
        for (stage, at), end in zip(marks, ends, strict=True):
            stages[stage] = stages.get(stage, 0.0) + (end - at).total_seconds()
        found = candidates(self.engine, created.id)
        return Finished(get_search(self.engine, created.id), found, seconds, stages)

    def _pool_for(self, spec: EvaluatorSpec) -> Pool:
        if self._pool is None or self._pool.spec != spec:
            self._pool = open_pool(spec)
        return self._pool
