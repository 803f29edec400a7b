"""A claimed search at work: what its stages say of themselves, and how they compute without computing twice.

Every write goes on trying while the database is away, and all can be repeated: an attempt outlives a lost connection,
and a search that is taken up again says and stores nothing twice.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from threading import Lock, Thread
from typing import Any, TypeVar

from sqlalchemy import Engine

from db import queue
from db.events import end_stage, tell
from db.results import Stored, forget_result, get_results, put_result
from db.retry import insist
from db.searches import set_summary
from db.states import Stage
from search.request import SearchRequest
from workers.counts import Counts
from workers.fingerprint import ModelChanged
from workers.pools import Pool
from workers.settings import patience
from workers.stopping import Shutdown
from workers.tasks import Checked, Content, Item, Result, Task

T = TypeVar("T")

NAMED = 5
"""So many units a message names at most."""

_ASIDE = Lock()
"""Held by what is computed aside: one that was left behind is not joined by the next search's."""

LOOK_SECONDS = 0.2
"""Between two looks whether to stop, while something long is computed here."""


@dataclass(slots=True)
class Run:
    """A claimed search at work.

    `check` raises when the search must stop at once (cancelled, lease lost); `more` is False when nothing new is to be
    begun (the worker was asked to stop). `summary` begins as the last attempt left it. `pool` and `content` are there
    once the model is known.
    """

    engine: Engine
    claim: queue.Claim
    request: SearchRequest
    check: Callable[[], None]
    more: Callable[[], bool]
    summary: dict[str, Any]
    counts: Counts = field(init=False)
    pool: Pool = field(init=False)
    content: Content = field(init=False)
    described_as: str = ""
    """The key of what evaluators said of the model."""
    _entered: Counter[Stage] = field(default_factory=Counter)
    _stage: tuple[Stage, float] | None = None
    """The present stage, and when it began."""

    def __post_init__(self) -> None:
        self.counts = Counts(self.claim.search_id)

    @property
    def evaluators(self) -> int:
        """How many there were when the search first looked: what is proposed together must not depend on who is there
        when it is taken up again."""
        if "evaluators" not in self.summary:
            self.summary["evaluators"] = len(self.pool)
        return int(self.summary["evaluators"])

    def insist(self, function: Callable[[], T]) -> T:
        """What a database call returns, tried again while the database is away, unless the search must stop."""
        return insist(function, seconds=patience(), check=self.check)

    def pause(self) -> None:
        """Raise what must stop the search now, or before anything new is begun."""
        self.check()
        if not self.more():
            raise Shutdown

    def aside(self, function: Callable[[], T]) -> T:
        """What a long computation in this process gives; it is left behind if the search must stop meanwhile, and the
        next one waits until it has ended."""
        done: Future[T] = Future()

        def work() -> None:
            try:
                with _ASIDE:
                    self.pause()
                    done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        Thread(target=copy_context().run, args=(work,), name="aside", daemon=True).start()
        while not wait([done], LOOK_SECONDS).done:
            self.pause()
        return done.result()

    def enter(self, stage: Stage, total: int, about: Mapping[str, Any] | None = None) -> None:
        """Say that a stage begins with `total` steps ahead; `about` goes into its event."""
        self.leave()
        self.pause()
        self._entered[stage] += 1
        self._stage = stage, time.monotonic()
        attempt = self.claim.attempt
        data = {"stage": stage, "total": total, "attempt": attempt} | dict(about or {})
        once = f"{attempt}:stage:{stage}:{self._entered[stage]}"
        self.insist(lambda: tell(self.engine, self.claim, "stage", data, once))
        self.progress(stage, 0, total)

    def leave(self) -> None:
        """Say that the present stage has ended, and what it took."""
        if self._stage is None:
            return
        (stage, began), self._stage = self._stage, None
        seconds, reused = time.monotonic() - began, self.counts.reused_lately()
        spent = self.summary.setdefault("stage_seconds", {})
        spent[stage] = spent.get(stage, 0.0) + seconds
        # Without the attempt: of a stage that several attempts go through, the first to end it is counted.
        once = f"stage_end:{stage}:{self._entered[stage]}"
        self.insist(lambda: end_stage(self.engine, self.claim, stage, seconds, reused, once))

    def progress(self, stage: Stage, done: float, total: float) -> None:
        """Say that so many steps of a stage are finished."""
        whole = int(done + 1e-9), int(total)
        self.insist(lambda: queue.progress(self.engine, self.claim, stage, *whole))

    def notice(self, message: str) -> None:
        """Tell the person something they may want to know."""
        once = f"notice:{hashlib.sha256(message.encode()).hexdigest()}"
        self.insist(lambda: tell(self.engine, self.claim, "notice", {"message": message}, once))

    def save(self) -> None:
        """Store the summary as it is."""
        self.summary |= self.counts.summary()
        self.insist(lambda: set_summary(self.engine, self.claim, self.summary))

    def succeed(self) -> None:
        """Finish the search."""
        self.leave()
        self.summary |= self.counts.summary()
        self.insist(lambda: queue.succeed(self.engine, self.claim, self.summary))

    def compute(
        self,
        task: Task,
        items: Sequence[Item],
        stage: Stage,
        *,
        vet: Callable[[Item, Result], None] = lambda _item, _result: None,
        part: tuple[float, float, float] | None = None,
    ) -> list[Result]:
        """Results of `task` on `items`, in order, found by the content that they depend on: evaluators that have other
        content refuse, and it is ModelChanged.

        `vet` sees each new one before it is stored, and raises what is wrong. The items are all of the stage's steps;
        or, by `part`, what comes after so many, of so many, each being so much of a step.
        """
        before, total, step = part or (0, len(items), 1)

        def done(count: int) -> None:
            self.progress(stage, before + step * count, total)

        keys = [self.content.key(task, item) for item in items]
        checked = replace(task, run=Checked(task.run, self.request.model, self.content))
        try:
            return self.results(keys, checked, items, vet, done)
        except ModelChanged:
            # Who said it may have had the wrong files: the next search asks again.
            self.insist(lambda: forget_result(self.engine, self.described_as))
            raise

    def results(
        self,
        keys: Sequence[str],
        task: Task,
        items: Sequence[Item],
        vet: Callable[[Item, Result], None] = lambda _item, _result: None,
        done: Callable[[int], None] = lambda _count: None,
    ) -> list[Result]:
        """Results of `task` on `items`, in order, kept under `keys`: stored ones are reused, each new one is stored as
        soon as it comes. `done` hears how many there are. Raises Shutdown when evaluators may begin nothing new."""
        stored = self.find(task.name, keys)
        results = {index: stored[key] for index, key in enumerate(keys) if key in stored}
        if results:
            done(len(results))
        missing = [index for index in range(len(keys)) if index not in results]
        wanted, began = [items[index] for index in missing], time.monotonic()
        for position, result in self.pool.map(task.run, wanted, check=self.check, more=self.more):
            index = missing[position]
            vet(items[index], result)
            seconds, began = time.monotonic() - began, time.monotonic()
            results[index] = self.keep(keys[index], task.name, result, seconds)
            done(len(results))
            self.check()
        if len(results) < len(items):
            raise Shutdown
        return [results[index] for index in range(len(items))]

    def find(self, kind: str, keys: Sequence[str]) -> dict[str, Any]:
        """What is stored under `keys`, which is counted."""
        stored = self._stored(keys)
        self.counts.add(kind, stored)
        return {key: one.value for key, one in stored.items()}

    def keep(self, key: str, kind: str, value: Any, seconds: float) -> Any:
        """Store what took `seconds` to compute, and give it as it is stored: what comes later must not depend on
        whether it was computed or found, nor on which of two searches was first."""
        self.insist(lambda: put_result(self.engine, key, kind, value, seconds, self.claim.search_id))
        return self.find(kind, [key])[key]

    def is_foreign(self, key: str) -> bool:
        """Whether something is stored under `key` that another search computed."""
        return any(one.search_id != self.claim.search_id for one in self._stored([key]).values())

    def _stored(self, keys: Sequence[str]) -> dict[str, Stored]:
        return self.insist(lambda: get_results(self.engine, keys))


def listed(names: Sequence[str]) -> str:
    """At most five names; the others are counted."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
