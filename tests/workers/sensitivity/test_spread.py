"""Spread over evaluators: who computes a part of a table does not matter."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from search.request import Calibration
from tests.workers.sensitivity.support import compute_on, space_of, subject
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity import FILLS
from workers.tasks import Compute, Item, Result, Task

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def evaluators(model_folder: Callable[[str], Path]) -> list[Evaluator]:
    """Of the same model and data, which know nothing of one another."""
    spec = EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=16, sequence_length=16))
    return [Evaluator.build(spec) for _ in range(2)]


def spread_over(evaluators: Sequence[Evaluator]) -> Compute:
    """Gives each item to the next evaluator, as to another process: what is sent and what comes back are copies, and
    nothing but the item says what is to be done. That pools do so, tests/workers/test_cluster.py has."""

    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        results = []
        for index, item in enumerate(items):
            torch.manual_seed(index % len(evaluators))  # Each process has drawn other numbers until now.
            run, item = pickle.loads(pickle.dumps((task.run, item)))
            results.append(pickle.loads(pickle.dumps(run(evaluators[index % len(evaluators)], item))))
        return results

    return compute


@pytest.mark.parametrize("metric", sorted(FILLS))
def test_two_evaluators_fill_the_same_table_as_one(metric: str, evaluators: list[Evaluator]) -> None:
    ignored = ["lm_head", "*.layers.1.*"] if metric == "pqi_single" else ["lm_head"]  # a pass for every unit takes long
    space = space_of(evaluators[0], "w3a16", "w4a8", ignore=ignored, pin={"*embed*": "w8a16"})
    asked = subject(evaluators[0], space, metric)
    two = FILLS[metric](spread_over(evaluators), asked)
    one = FILLS[metric](compute_on(evaluators[0]), asked)
    np.testing.assert_allclose(two.values, one.values, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(two.stderr, one.stderr, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("metric", sorted(set(FILLS) - {"weight_mse", "size"}))
def test_there_is_work_for_two_evaluators(metric: str, evaluators: list[Evaluator]) -> None:
    """The task that sees the data comes in at least two items."""
    counts: dict[str, int] = {}

    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        if task.uses_data:
            counts[task.name] = max(counts.get(task.name, 0), len(items))
        return [task.run(evaluators[0], item) for item in items]

    space = space_of(evaluators[0], "w3a16", "w4a16", ignore=["lm_head", "*embed*"])
    FILLS[metric](compute, subject(evaluators[0], space, metric))
    assert max(counts.values()) >= 2, counts
