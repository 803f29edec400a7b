"""The pool protocol, over every implementation."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search.errors import InvalidRequest
from search.request import Calibration
from workers.cluster import InProcessPool, Pool, RayPool, stop_ray
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.tasks import MEASURE, Item, Result


def square(_evaluator: Evaluator, item: Item) -> Result:
    return {"square": item["value"] ** 2}


def refuse(_evaluator: Evaluator, item: Item) -> Result:
    raise InvalidRequest("no", field="space.pin", value=item["value"], accepted="another")


@pytest.fixture(scope="module")
def spec(model_folder: Callable[[str], Path]) -> EvaluatorSpec:
    return EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=2, sequence_length=8))


@pytest.fixture(scope="module", params=[InProcessPool, RayPool])
def pool(request: pytest.FixtureRequest, spec: EvaluatorSpec) -> Iterator[Pool]:
    pool: Pool = request.param(spec)
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


def test_every_pool_measures_the_same(pool: Pool, spec: EvaluatorSpec) -> None:
    item: Item = {"model.layers.0.self_attn.q_proj": "w2a16"}
    ((_, metrics),) = pool.map(MEASURE.run, [item])
    expected = MEASURE.run(Evaluator.build(spec), item)
    assert metrics["loss"] > 0
    assert metrics == pytest.approx(expected, rel=1e-5)
