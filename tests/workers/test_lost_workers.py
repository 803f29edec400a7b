"""What Ray's pool must do beyond the protocol: outlive its workers."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search.request import Calibration
from workers.cluster import RayPool, WorkersLost, stop_ray
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.tasks import Item, Result


def die_once(_evaluator: Evaluator, item: Item) -> Result:
    mark = Path(item["mark"])
    if item["value"] == 2 and not mark.exists():
        mark.touch()
        os._exit(1)
    return {"square": item["value"] ** 2}


def die(_evaluator: Evaluator, _item: Item) -> Result:
    os._exit(1)


@pytest.fixture(scope="module")
def pool(model_folder: Callable[[str], Path]) -> Iterator[RayPool]:
    pool = RayPool(EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=2, sequence_length=8)))
    yield pool
    pool.close()
    stop_ray()


def test_the_task_of_a_worker_that_died_is_repeated(pool: RayPool, tmp_path: Path) -> None:
    items = [{"value": value, "mark": str(tmp_path / "died")} for value in range(5)]
    found = dict(pool.map(die_once, items))
    assert (tmp_path / "died").exists()
    assert found == {value: {"square": value**2} for value in range(5)}


def test_a_task_that_kills_every_worker_is_a_problem_not_a_traceback(pool: RayPool) -> None:
    with pytest.raises(WorkersLost, match="died"):
        list(pool.map(die, [{}]))
