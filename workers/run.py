"""A claimed search at work: what its stages say of themselves, and how they compute without computing twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine

from db import queue
from db.events import add_event
from db.results import get_results, put_result
from db.searches import set_summary
from db.tables import Stage
from search.request import SearchRequest
from workers.cluster import Pool
from workers.tasks import Content, Item, Result, Task

NAMED = 5
"""So many units a message names at most."""


@dataclass(slots=True)
class Run:
    """A claimed search at work. `check` raises when the search must stop (cancelled, lease lost, shutdown)."""

    engine: Engine
    claim: queue.Claim
    request: SearchRequest
    pool: Pool
    check: Callable[[], None]
    content: Content | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    def enter(self, stage: Stage, total: int, about: Mapping[str, Any] | None = None) -> None:
        """Say that a stage begins with `total` steps ahead; `about` goes into its event."""
        self.check()
        add_event(self.engine, self.claim.search_id, "stage", {"stage": stage, "total": total} | dict(about or {}))
        queue.progress(self.engine, self.claim, stage, 0, total)

    def notice(self, message: str) -> None:
        """Tell the person something they may want to know."""
        add_event(self.engine, self.claim.search_id, "notice", {"message": message})

    def save(self) -> None:
        """Store the summary as it is."""
        set_summary(self.engine, self.claim, self.summary)

    def compute(
        self,
        task: Task,
        items: Sequence[Item],
        stage: Stage,
        done: Callable[[int, Result], None] = lambda _index, _result: None,
        *,
        vet: Callable[[Item, Result], None] = lambda _item, _result: None,
        part: tuple[float, float, float] | None = None,
    ) -> list[Result]:
        """Results of `task` on `items`, in order: stored ones are reused, each new one is stored as soon as it comes.

        `done` hears of each result as it comes; `vet` sees each new one before it is stored, and raises what is wrong.
        The items are all of the stage's steps; or, by `part`, what comes after so many, of so many, each being so much
        of a step.
        """
        assert self.content is not None
        keys = [self.content.key(task, item) for item in items]
        results: dict[int, Result] = {}
        before, total, step = part or (0, len(items), 1)
        stored = get_results(self.engine, keys)

        def finish(index: int, result: Result) -> None:
            results[index] = result
            done(index, result)
            queue.progress(self.engine, self.claim, stage, int(before + step * len(results) + 1e-9), int(total))

        for index, key in enumerate(keys):
            if key in stored:
                finish(index, stored[key])
        missing = [index for index, key in enumerate(keys) if key not in stored]
        self.summary["reused"] = self.summary.get("reused", 0) + len(stored)
        self.summary["computed"] = self.summary.get("computed", 0) + len(missing)
        began = time.monotonic()
        for position, result in self.pool.map(task.run, [items[index] for index in missing]):
            vet(items[missing[position]], result)
            seconds, began = time.monotonic() - began, time.monotonic()
            put_result(self.engine, keys[missing[position]], task.name, result, seconds)
            self.check()
            finish(missing[position], result)
        return [results[index] for index in range(len(items))]


def listed(names: Sequence[str]) -> str:
    """At most five names; the others are counted."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
