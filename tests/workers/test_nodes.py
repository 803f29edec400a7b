"""A cluster of three nodes, some of which die, and one that joins."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.request import Calibration
from tests.aside import PATIENCE, aside, wait_until
from tests.workers.nodes import STORE, three_nodes
from workers.cluster import start_ray
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.pools import InProcessPool, RayPool
from workers.tasks import MEASURE, Item, Result

pytestmark = pytest.mark.long


def measure(evaluator: Evaluator, item: Item) -> Result:
    """Says who is at it, waits until it may, and measures."""
    ray, mark = sys.modules.get("ray"), Path(item["folder"]) / str(item["value"])
    node = ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else ""
    (mark.parent / "writing").mkdir(exist_ok=True)
    written = mark.parent / "writing" / f"{mark.name}-{os.getpid()}"
    written.write_text(f"{os.getpid()} {node}")
    written.rename(mark)
    wait_until((mark.parent / "go").exists)
    scheme = f"w{2 + item['value']}a16"
    allocation = {"model.layers.0.self_attn.q_proj": scheme}
    return dict(MEASURE.run(evaluator, {"allocation": allocation, "split": "held_out"})) | {"node": node}


def items(folder: Path, count: int) -> list[Item]:
    folder.mkdir(exist_ok=True)
    return [{"value": value, "folder": str(folder)} for value in range(count)]


def at_work(folder: Path) -> list[tuple[int, str]]:
    """The process and the node of each item that was begun."""
    marks = [mark.read_text().split() for mark in folder.iterdir() if mark.name.isdecimal()]
    return [(int(process), node) for process, node in marks]


def samples(found: dict[int, Result]) -> dict[int, list[float]]:
    return {index: result["loss"] for index, result in found.items()}


@pytest.fixture(scope="module")
def spec(model_folder: Callable[[str], Path]) -> EvaluatorSpec:
    return EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=2, sequence_length=8))


@pytest.fixture(scope="module")
def expected(spec: EvaluatorSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    """What a pool in this process finds."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "go").touch()
    return samples(dict(InProcessPool(spec).map(measure, items(folder, 6))))


@pytest.fixture(scope="module")
def cluster(expected: object) -> Iterator[Any]:
    with three_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pool(cluster: Any, spec: EvaluatorSpec) -> Iterator[RayPool]:
    pool = RayPool(spec)
    pool.prepare()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def released(tmp_path: Path) -> Iterator[None]:
    """Whatever becomes of a test: no evaluator waits on for its sign."""
    yield
    (tmp_path / "go").touch()


def nodes() -> set[str]:
    return {node["NodeID"] for node in start_ray().nodes() if node["Alive"]}


def test_the_items_of_a_map_spread_over_all_nodes(
    pool: RayPool, expected: dict[int, list[float]], tmp_path: Path
) -> None:
    assert len(pool) == 3
    running = aside(lambda: dict(pool.map(measure, items(tmp_path, 6))))
    wait_until(lambda: len(at_work(tmp_path)) == 3)
    assert {node for _, node in at_work(tmp_path)} == nodes()
    (tmp_path / "go").touch()
    assert samples(running.result(PATIENCE)) == expected


def test_the_item_of_an_evaluator_that_is_killed_is_done_by_another(
    pool: RayPool, expected: dict[int, list[float]], tmp_path: Path
) -> None:
    running = aside(lambda: dict(pool.map(measure, items(tmp_path, 6))))
    wait_until(lambda: at_work(tmp_path))
    os.kill(at_work(tmp_path)[0][0], signal.SIGKILL)
    (tmp_path / "go").touch()
    assert samples(running.result(PATIENCE)) == expected


def test_a_second_pool_gets_its_share_of_a_full_cluster(
    pool: RayPool, spec: EvaluatorSpec, expected: dict[int, list[float]], tmp_path: Path
) -> None:
    second, done = RayPool(replace(spec, files="another")), tmp_path / "done"
    (tmp_path / "go").touch()
    many = items(tmp_path, 6) * 10_000
    first = aside(lambda: sum(1 for _ in pool.map(measure, many, more=lambda: not done.exists())))
    try:
        assert samples(dict(second.map(measure, items(tmp_path, 6)))) == expected
        assert pool.held + second.held == 3
        assert not first.done()
    finally:
        done.touch()
        second.close()
    assert first.result(PATIENCE) > 0


def test_the_items_of_a_node_that_is_killed_are_done_elsewhere(
    cluster: Any, pool: RayPool, expected: dict[int, list[float]], tmp_path: Path
) -> None:
    running = aside(lambda: dict(pool.map(measure, items(tmp_path, 6))))
    others = {node.node_id: node for node in cluster.worker_nodes}
    wait_until(lambda: {node for _, node in at_work(tmp_path)} & others.keys())
    died = next(node for _, node in at_work(tmp_path) if node in others)
    cluster.remove_node(others[died], allow_graceful=False)
    wait_until(lambda: died not in nodes())
    (tmp_path / "go").touch()
    found = running.result(PATIENCE)
    assert samples(found) == expected
    assert died not in {result["node"] for result in found.values()}


def test_a_node_that_joins_during_a_map_is_used(cluster: Any, pool: RayPool, tmp_path: Path) -> None:
    running = aside(lambda: dict(pool.map(measure, items(tmp_path, 6))))
    joined = cluster.add_node(num_cpus=1, object_store_memory=STORE).node_id
    wait_until(lambda: joined in {node for _, node in at_work(tmp_path)})
    (tmp_path / "go").touch()
    running.result(PATIENCE)


@pytest.fixture(scope="module")
def gpus(cluster: Any, pool: RayPool) -> None:
    """A node that says that it has two GPUs; nothing that runs here computes on them."""
    pool.close()
    cluster.add_node(num_cpus=4, num_gpus=2, object_store_memory=STORE)
    wait_until(lambda: start_ray().cluster_resources().get("GPU") == 2)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("asked", "count"), [("auto", 2), ("0.5", 4), ("1", 2), ("2", 1)])
def test_there_is_an_evaluator_for_so_many_gpus(
    asked: str, count: int, spec: EvaluatorSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITFRONTIER_GPUS_PER_EVALUATOR", asked)
    assert len(RayPool(replace(spec, device="cuda"))) == count
    monkeypatch.setenv("BITFRONTIER_POOL_SIZE", "1")
    assert len(RayPool(replace(spec, device="cuda"))) == 1


@pytest.mark.usefixtures("gpus")
def test_an_evaluator_of_several_gpus_takes_them_and_gives_them_back(
    spec: EvaluatorSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITFRONTIER_GPUS_PER_EVALUATOR", "2")
    pool = RayPool(replace(spec, device="cuda"))
    pool.prepare()
    wait_until(lambda: not start_ray().available_resources().get("GPU"))
    pool.close()
    wait_until(lambda: start_ray().available_resources().get("GPU") == 2)


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("gpus")
def test_a_pool_for_which_there_is_no_room_says_so_and_can_be_stopped(
    spec: EvaluatorSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITFRONTIER_GPUS_PER_EVALUATOR", "3")
    monkeypatch.setattr("workers.pools.ray_pool.WAIT_SECONDS", 1.0)
    pool, told, checks = RayPool(replace(spec, device="cuda")), [], []
    pool.on_wait = told.append

    def check() -> None:
        checks.append(len(told))
        if checks.count(1) > 10:
            raise Stopped

    with pytest.raises(Stopped):
        list(pool.map(measure, [{}], check=check))
    pool.close()
    (reason,) = told
    assert reason.startswith("waiting for an evaluator, which takes 1 core and 3 GPUs: the cluster has ")
    assert reason.endswith("2 of 2 GPUs free")
    assert checks.count(0) > 1, "it looks while it waits"
