"""The pool protocol, over every implementation."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from search.errors import InvalidRequest
from search.request import Calibration
from workers.cluster import InProcessPool, Pool, RayPool, evaluators_per_node, start_ray, stop_ray
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.tasks import MEASURE, Item, Result


def square(_evaluator: Evaluator, item: Item) -> Result:
    return {"square": item["value"] ** 2}


def refuse(_evaluator: Evaluator, item: Item) -> Result:
    raise InvalidRequest("no", field="space.pin", value=item["value"], accepted="another")


@pytest.fixture(scope="module")
def spec(model_folder: Callable[[str], Path]) -> EvaluatorSpec:
    return EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=2, sequence_length=8))


@pytest.fixture(scope="module", params=["in process", "ray", "two of ray"])
def pool(request: pytest.FixtureRequest, spec: EvaluatorSpec) -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BITFRONTIER_EVALUATORS", "2" if request.param == "two of ray" else "1")
        pool: Pool = InProcessPool(spec) if request.param == "in process" else RayPool(spec)
    yield pool
    pool.close()
    stop_ray()


def test_every_item_has_its_own_result(pool: Pool) -> None:
    found = dict(pool.map(square, [{"value": value} for value in range(7)]))
    assert found == {value: {"square": value**2} for value in range(7)}


def test_no_items_give_no_results(pool: Pool) -> None:
    assert list(pool.map(square, [])) == []


def test_a_problem_arrives_with_its_field_value_and_accepted(pool: Pool) -> None:
    with pytest.raises(InvalidRequest) as refused:
        list(pool.map(refuse, [{"value": 5}]))
    assert refused.value.problem()["field"] == "space.pin"
    assert (refused.value.value, refused.value.accepted) == (5, "another")
    assert dict(pool.map(square, [{"value": 3}])) == {0: {"square": 9}}


def test_a_map_that_is_left_early_leaves_the_pool_usable(pool: Pool) -> None:
    results = pool.map(square, [{"value": value} for value in range(5)])
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert dict(pool.map(square, [{"value": 3}])) == {0: {"square": 9}}


def where(_evaluator: Evaluator, _item: Item) -> Result:
    time.sleep(0.2)
    return {"process": os.getpid(), "threads": torch.get_num_threads()}


def test_evaluators_share_the_items_and_the_threads_of_a_node(pool: Pool) -> None:
    results = [result for _, result in pool.map(where, [{}] * 6)]
    if isinstance(pool, RayPool):
        count, cores = len(pool), int(start_ray().cluster_resources()["CPU"])
        assert len({result["process"] for result in results}) == count
        assert {result["threads"] for result in results} == {cores // count}
    else:
        assert {result["process"] for result in results} == {os.getpid()}


def test_as_many_evaluators_are_started_as_were_asked_for(pool: Pool, request: pytest.FixtureRequest) -> None:
    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    expected = {"in process": 1, "ray": 1, "two of ray": min(2, cores or 1)}
    assert len(pool) == expected[request.node.callspec.params["pool"]]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_a_number_of_evaluators_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFRONTIER_EVALUATORS", text)
    with pytest.raises(ValueError, match="a whole number, at least 1"):
        evaluators_per_node()


def test_every_pool_measures_the_same(pool: Pool, spec: EvaluatorSpec) -> None:
    item: Item = {"allocation": {"model.layers.0.self_attn.q_proj": "w2a16"}, "split": "held_out"}
    ((_, samples),) = pool.map(MEASURE.run, [item])
    expected = MEASURE.run(Evaluator.build(spec), item)
    assert min(samples["loss"]) > 0
    assert set(samples) == set(expected)
    for name, values in expected.items():
        assert samples[name] == pytest.approx(values, rel=1e-5)
