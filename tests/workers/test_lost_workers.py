"""What Ray's pool must do beyond the protocol: outlive its workers, and stop them."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search.request import Calibration
from tests.aside import wait_until
from workers.cluster import stop_ray
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.pools import RayPool, TaskTimedOut, WorkersLost, ray_pool
from workers.tasks import Item, Result

pytestmark = pytest.mark.long


class Cancelled(Exception):
    pass


def square(_evaluator: Evaluator, item: Item) -> Result:
    return {"square": item["value"] ** 2}


def die_once(_evaluator: Evaluator, item: Item) -> Result:
    mark = Path(item["mark"])
    if item["value"] == 2 and not mark.exists():
        mark.touch()
        os._exit(1)
    return {"square": item["value"] ** 2}


def die(_evaluator: Evaluator, _item: Item) -> Result:
    os._exit(1)


def hang(_evaluator: Evaluator, item: Item) -> Result:
    with Path(item["mark"]).open("a") as mark:
        mark.write(f"{os.getpid()}\n")
    time.sleep(3600)
    return {}


def hang_once(evaluator: Evaluator, item: Item) -> Result:
    return hang(evaluator, item) if not Path(item["mark"]).exists() else square(evaluator, item)


@pytest.fixture(scope="module")
def spec(model_folder: Callable[[str], Path]) -> EvaluatorSpec:
    return EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=2, sequence_length=8))


@pytest.fixture(scope="module")
def pool(spec: EvaluatorSpec) -> Iterator[RayPool]:
    pool = RayPool(spec)
    yield pool
    pool.close()
    stop_ray()


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_the_task_of_a_worker_that_died_is_repeated(pool: RayPool, tmp_path: Path) -> None:
    items = [{"value": value, "mark": str(tmp_path / "died")} for value in range(5)]
    found = dict(pool.map(die_once, items))
    assert (tmp_path / "died").exists()
    assert found == {value: {"square": value**2} for value in range(5)}


def test_a_check_that_raises_stops_what_is_under_way(pool: RayPool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def check() -> None:
        if mark.exists() and mark.read_text():
            raise Cancelled

    with pytest.raises(Cancelled):
        list(pool.map(hang, [{"mark": str(mark)}], check=check))
    process = int(mark.read_text())
    wait_until(lambda: not is_alive(process), "the evaluator is stopped")


def test_an_item_that_takes_too_long_is_tried_once_more(
    pool: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough to have the evaluator's answer on a busy machine.
    monkeypatch.setattr(pool, "_item_seconds", 3.0)
    found = dict(pool.map(hang_once, [{"value": 5, "mark": str(tmp_path / "hung")}]))
    assert found == {0: {"square": 25}}


def test_an_item_that_takes_too_long_twice_is_a_problem(
    pool: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_item_seconds", 3.0)
    with pytest.raises(TaskTimedOut, match=r"'hang' took longer than 3 s, 2 times") as timed_out:
        list(pool.map(hang, [{"mark": str(tmp_path / "hung")}]))
    assert timed_out.value.problem()["type"].endswith("task-timed-out")
    assert len(set((tmp_path / "hung").read_text().split())) == 2


def test_a_task_that_kills_every_worker_is_a_problem_not_a_traceback(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.pools.ray_pool.LOST_WORKER_RETRIES", 1)
    with pytest.raises(WorkersLost, match="died 2 times at one item"):
        list(pool.map(die, [{}]))


class Stalled(ray_pool._Actor):
    def load(self) -> None:
        time.sleep(600)


def test_loading_that_takes_too_long_is_a_problem(spec: EvaluatorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a file system or the hub does not answer."""
    pool = RayPool(spec)
    monkeypatch.setattr(pool, "_load_seconds", 0.5)
    monkeypatch.setattr("workers.pools.ray_pool._Actor", Stalled)
    with pytest.raises(TaskTimedOut, match=r"loading the model took longer than 0\.5 s, 2 times"):
        list(pool.map(square, [{"value": 3}]))
    pool.close()
