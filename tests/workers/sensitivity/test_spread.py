"""Spread over evaluators: who computes a part of a table does not matter."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from search.request import Calibration
from tests.workers.sensitivity.support import space_of, subject
from workers.cluster import RayPool, stop_ray
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity import FILLS
from workers.tasks import Compute, Item, Result, Task


@pytest.fixture(scope="module")
def spec(model_folder: Callable[[str], Path]) -> EvaluatorSpec:
    return EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=16, sequence_length=16))


@pytest.fixture(scope="module")
def evaluator(spec: EvaluatorSpec) -> Evaluator:
    return Evaluator.build(spec)


@pytest.fixture(scope="module")
def pool(spec: EvaluatorSpec) -> Iterator[RayPool]:
    """Two evaluators in processes of their own."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BITFRONTIER_EVALUATORS", "2")
        pool = RayPool(spec)
    yield pool
    pool.close()
    stop_ray()


def spread_over(pool: RayPool) -> Compute:
    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        found = dict(pool.map(task.run, items))
        return [found[index] for index in range(len(items))]

    return compute


@pytest.mark.parametrize("metric", sorted(FILLS))
def test_two_evaluators_fill_the_same_table_as_one(metric: str, evaluator: Evaluator, pool: RayPool) -> None:
    space = space_of(evaluator, "w3a16", "w4a8", ignore=["lm_head"], pin={"*embed*": "w8a16"})
    asked = subject(evaluator, space, metric)
    two = FILLS[metric](spread_over(pool), asked)
    one = FILLS[metric](lambda task, items: [task.run(evaluator, item) for item in items], asked)
    np.testing.assert_allclose(two.values, one.values, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(two.stderr, one.stderr, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("metric", sorted(set(FILLS) - {"weight_mse", "size"}))
def test_there_is_work_for_two_evaluators(metric: str, evaluator: Evaluator) -> None:
    """The task that sees the data comes in at least two items."""
    counts: dict[str, int] = {}

    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        if task.uses_data:
            counts[task.name] = max(counts.get(task.name, 0), len(items))
        return [task.run(evaluator, item) for item in items]

    space = space_of(evaluator, "w3a16", "w4a16", ignore=["lm_head", "*embed*"])
    FILLS[metric](compute, subject(evaluator, space, metric))
    assert max(counts.values()) >= 2, counts
