"""Searches on the digits ViT, as the tests of this room ask for them and do them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, delete

from db import queue
from db.searches import Search, create_search
from db.tables import ResultRow
from search.request import SearchRequest
from tests.aside import PATIENCE, aside
from workers.evaluator import EvaluatorSpec
from workers.pipeline import run_search
from workers.pools import Function, InProcessPool, Pool
from workers.tasks import Item, Result
from workers.worker import Worker

SCHEMES = ["w2a16", "w3a16", "w4a16", "w8a16"]


class Counting(InProcessPool):
    """Counts what it computes, dies after so many results, and says that it has so many evaluators."""

    def __init__(self, spec: EvaluatorSpec, lives: float = float("inf"), size: int = 1) -> None:
        super().__init__(spec)
        self.computed = 0
        self.lives, self.size = lives, size

    def __len__(self) -> int:
        return self.size

    def map(self, function: Function, items: Sequence[Item], **stopping: Any) -> Iterator[tuple[int, Result]]:
        for result in super().map(function, items, **stopping):
            if self.computed >= self.lives:
                raise KeyboardInterrupt
            self.computed += 1
            yield result


def ask(engine: Engine, **changes: object) -> Search:
    document = {
        "model": "digits-vit",
        "calibration": {"dataset": "digits", "samples": 64},
        "space": {"schemes": SCHEMES},
        "budgets": {"avg_bits": 4.5},
        "optimizer": {"points": 8, "evaluations": 14},
    }
    return create_search(engine, SearchRequest.model_validate(document | changes))[0]


def claim(engine: Engine, owner: str = "test", seconds: float = 60) -> queue.Claim:
    claimed = queue.claim(engine, owner, timedelta(seconds=seconds))
    assert claimed is not None
    return claimed


def work(engine: Engine, pool_for: Callable[[EvaluatorSpec], Pool] = InProcessPool) -> None:
    run_search(engine, claim(engine), pool_for, lambda: None)


def forget_results(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(delete(ResultRow))


@contextmanager
def working(worker: Worker) -> Iterator[None]:
    """Within, the worker works in a thread; afterwards it has been told to stop and has ended."""
    work = aside(worker.run)
    try:
        yield
    finally:
        worker.stop()
        work.result(PATIENCE)
