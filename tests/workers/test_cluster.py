"""The pool protocol, over every implementation, and how Ray is joined."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from search.errors import InvalidRequest
from search.request import Calibration
from tests.aside import wait_until
from workers.cluster import ClusterOpen, authenticate, start_ray, stop_ray
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.fingerprint import ModelChanged
from workers.pools import InProcessPool, Pool, RayPool
from workers.pools.demand import Demand
from workers.pools.gpus import GpuDemand
from workers.tasks import MEASURE, Checked, Content, Item, Result

pytestmark = pytest.mark.long


class Stopped(Exception):
    pass


def square(_evaluator: Evaluator, item: Item) -> Result:
    return {"square": item["value"] ** 2}


def refuse(_evaluator: Evaluator, item: Item) -> Result:
    raise InvalidRequest("no", field="space.pin", value=item["value"], accepted="another")


@pytest.fixture(scope="module")
def spec(model_folder: Callable[[str], Path]) -> EvaluatorSpec:
    return EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=2, sequence_length=8))


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    """Ray takes seconds to start: every pool finds it as the first left it."""
    yield
    stop_ray()


@pytest.fixture(scope="module", params=["in process", "ray", "two of ray"])
def pool(request: pytest.FixtureRequest, spec: EvaluatorSpec, _ray: None) -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BITFRONTIER_EVALUATORS", "2" if request.param == "two of ray" else "1")
        pool: Pool = InProcessPool(spec) if request.param == "in process" else RayPool(spec)
        pool.prepare()
    yield pool
    pool.close()


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


def test_an_evaluator_that_has_another_model_than_was_described_refuses(pool: Pool) -> None:
    with pytest.raises(ModelChanged, match="the files of 'm' changed while it was searched, or differ on another"):
        list(pool.map(Checked(square, "m", Content("another", "data", "rtn")), [{"value": 5}]))


def test_a_map_that_is_left_early_leaves_the_pool_usable(pool: Pool) -> None:
    results = pool.map(square, [{"value": value} for value in range(5)])
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert dict(pool.map(square, [{"value": 3}])) == {0: {"square": 9}}


def test_a_check_that_raises_ends_the_map(pool: Pool) -> None:
    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        list(pool.map(square, [{"value": 3}], check=stop))
    assert dict(pool.map(square, [{"value": 3}])) == {0: {"square": 9}}


def test_no_item_is_begun_once_there_is_to_be_no_more(pool: Pool) -> None:
    found: list[int] = []
    for index, result in pool.map(square, [{"value": value} for value in range(9)], more=lambda: len(found) < 2):
        assert result == {"square": index**2}
        found.append(index)
    # What the other evaluators were at when it was said still comes.
    assert 2 <= len(found) <= 2 + len(pool)


def where(_evaluator: Evaluator, _item: Item) -> Result:
    time.sleep(0.2)
    return {"process": os.getpid(), "threads": torch.get_num_threads()}


def test_evaluators_share_the_items_and_the_threads_of_a_node(pool: Pool) -> None:
    count = len(pool)
    while isinstance(pool, RayPool) and pool.ready < count:
        list(pool.map(where, [{}] * 2))
    results = [result for _, result in pool.map(where, [{}] * 6)]
    if isinstance(pool, RayPool):
        cores = int(start_ray().cluster_resources()["CPU"])
        assert len({result["process"] for result in results}) == count
        assert {result["threads"] for result in results} == {cores // count}
    else:
        assert {result["process"] for result in results} == {os.getpid()}


def test_as_many_evaluators_are_started_as_were_asked_for(pool: Pool, request: pytest.FixtureRequest) -> None:
    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    expected = {"in process": 1, "ray": 1, "two of ray": min(2, cores or 1)}
    assert len(pool) == pool.held == expected[request.node.callspec.params["pool"]]


def test_every_pool_measures_the_same(pool: Pool, spec: EvaluatorSpec) -> None:
    item: Item = {"allocation": {"model.layers.0.self_attn.q_proj": "w2a16"}, "split": "held_out"}
    ((_, samples),) = pool.map(MEASURE.run, [item])
    expected = MEASURE.run(Evaluator.build(spec), item)
    assert min(samples["loss"]) > 0
    assert set(samples) == set(expected)
    for name, values in expected.items():
        assert samples[name] == pytest.approx(values, rel=1e-5)


def test_a_closed_pool_holds_nothing(pool: Pool) -> None:
    """The last of the tests on a pool: building evaluators again takes long."""
    pool.close()
    assert pool.held == 0
    if isinstance(pool, RayPool):
        ray = start_ray()
        wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "all cores are free")


def never() -> None:
    time.sleep(600)


@pytest.mark.usefixtures("_ray")
def test_a_model_whose_size_nobody_tells_in_time_is_given_one_gpu(spec: EvaluatorSpec) -> None:
    """Loading it then has a time limit of its own."""
    ray = start_ray()
    demand = GpuDemand(ray, spec)
    demand._asked, demand._until = ray.remote(never).options(num_cpus=0).remote(), time.monotonic() + 60
    assert demand.known() is None
    demand._until = time.monotonic() - 1
    assert demand.known() == Demand(1, 1)
    ray.cancel(demand._asked, force=True)


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token in the environment, and none where Ray looks for one."""
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        # What a test's subject sets is taken back, too.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("no_token")
def test_a_cluster_that_asks_for_no_token_is_refused_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ClusterOpen, match="no token") as refused:
        authenticate()
    assert refused.value.field == "RAY_AUTH_TOKEN"
    assert "RAY_AUTH_MODE=disabled" in refused.value.accepted


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize("variable", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_cluster_with_a_token_is_joined_with_it(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv(variable, "given")
    authenticate()
    assert (os.environ["RAY_AUTH_MODE"], os.environ[variable]) == ("token", "given")


@pytest.mark.usefixtures("no_token")
def test_who_says_that_a_cluster_may_be_open_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    authenticate()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.usefixtures("no_token")
def test_ray_on_this_machine_asks_for_a_fresh_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    authenticate()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_ray_that_was_left_is_not_started_by_what_is_asked_of_it() -> None:
    """It would be another one, with settings of its own, and whoever started Ray next would be given it."""
    ray = start_ray()
    stop_ray()
    with pytest.raises(ray.exceptions.RaySystemError):
        ray.put(1)
    assert not ray.is_initialized()
