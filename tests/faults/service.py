"""A service to be disturbed: one database, the workers that a test starts on it, and the search that they are at."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pytest
from sqlalchemy import Engine, make_url, text

from db.searches import create_search, get_search
from search.request import SearchRequest
from tests.aside import PATIENCE
from tests.faults import processes
from tests.faults.processes import Forked
from tests.faults.records import Follower
from tests.faults.traps import Traps

REQUEST = {
    "model": "tiny-llama",
    "calibration": {"samples": 8, "sequence_length": 16},
    "space": {"schemes": ["w3a16", "w4a16", "w8a16"]},
    "budgets": {"avg_bits": 4.5},
    "sensitivity": ["kl"],
}
OPTIMIZERS = {
    "refine": {"points": 4, "evaluations": 8},
    "evolution": {"method": "evolution", "points": 2, "evaluations": 8},
}
"""Of searches as small as they get with every stage in them."""

POLL = 0.02

FINAL = ("succeeded", "failed", "cancelled")


class Service:
    """Every wait has a deadline, and says what it waited for and what the processes have said."""

    def __init__(self, engine: Engine, url: str, folder: Path) -> None:
        self.engine, self.url = engine, url
        self._folder, self._numbers = folder, itertools.count(1)
        self.workers: list[Forked] = []
        self.search_id, self.api = 0, ""
        self.follower = Follower(engine, 0)

    @cached_property
    def traps(self) -> Traps:
        """What the test lays in the way of writes."""
        return Traps(self.engine)

    def post(self, method: str = "refine", attempts: int = 30) -> int:
        """Queue a search, which may take so many attempts, and follow it; its id."""
        request = SearchRequest.model_validate(REQUEST | {"optimizer": OPTIMIZERS[method]})
        self.search_id = create_search(self.engine, request)[0].id
        self.follower = Follower(self.engine, self.search_id)
        self.execute(f"UPDATE searches SET max_attempts = {attempts} WHERE id = {self.search_id}")
        return self.search_id

    def worker(self, role: str | None = None, **settings: str) -> Forked:
        """Start a worker, which talks to the database as `role`."""
        url = make_url(self.url).set(username=role) if role else make_url(self.url)
        address = {"BITFRONTIER_DATABASE_URL": url.render_as_string(hide_password=False)}
        return self.start(processes.work, address | {"BITFRONTIER_POOL": "inprocess"} | settings)

    def start(self, function: Callable[[], object], environment: dict[str, str]) -> Forked:
        """Fork a process."""
        log = self._folder / f"process-{next(self._numbers)}-{time.monotonic_ns()}.log"
        self.workers.append(Forked(function, environment, log))
        return self.workers[-1]

    def until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Follow the search until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.follower.read()
            if time.monotonic() > deadline:
                pytest.fail(f"after {seconds:g} s still waiting until {what}\n{self.told()}")
            time.sleep(POLL)

    def until_told(self, kind: str, seconds: float = PATIENCE, **data: object) -> None:
        """Follow the search until it tells something of this kind and content that it has not told yet."""
        known = len(self.follower.heard)

        def told() -> bool:
            new = self.follower.heard[known:]
            return any(one.kind == kind and one.data.items() >= data.items() for one in new)

        self.until(told, f"the search tells {kind} {data}", seconds)

    def until_ended(self, seconds: float = PATIENCE) -> None:
        """Follow the search until it has ended."""
        self.until(lambda: get_search(self.engine, self.search_id).state in FINAL, "the search ends", seconds)

    def expire(self) -> None:
        """Let the leases run out, now that whoever had them is dead."""
        self.execute("UPDATE searches SET lease_until = now() - interval '1 second' WHERE state = 'running'")

    def create_role(self, name: str) -> None:
        """A role of the database whose connections and writes can be told from others'."""
        create = f"CREATE ROLE {name} SUPERUSER LOGIN"
        self.execute(f"DO $$ BEGIN {create}; EXCEPTION WHEN duplicate_object THEN END $$")

    def execute(self, statement: str) -> None:
        """Run SQL."""
        with self.engine.begin() as connection:
            connection.execute(text(statement))

    def told(self) -> str:
        """What the search and its workers have said."""
        search = get_search(self.engine, self.search_id) if self.search_id else None
        state = search and (search.state, search.stage, search.done, search.attempt, search.error)
        logs = [f"--- {one.pid}:\n{one.log.read_text()[-3000:] if one.log.exists() else ''}" for one in self.workers]
        return f"{state}\n" + "\n".join(logs)

    def stop(self) -> None:
        """Ask the workers that live to stop, and see that they do."""
        stopped = {worker.pid: worker.stop() for worker in self.workers if worker.alive}
        assert set(stopped.values()) <= {0}, f"{stopped}\n{self.told()}"

    def close(self) -> None:
        """Kill what is left."""
        for worker in self.workers:
            worker.kill()
        if "traps" in self.__dict__:
            self.traps.close()
