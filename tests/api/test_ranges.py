from __future__ import annotations

from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from db.models import put_model
from search.cost import cost_tables
from search.request import SearchRequest
from search.space import build_space
from search.targets import find_target
from tests.api import examples

BODY = {name: examples.REQUEST[name] for name in ("model", "target", "space")}


def test_ranges_are_what_configurations_cost(client: TestClient, engine: Engine) -> None:
    inventory = examples.store_model(engine)
    ranges = client.post("/v1/ranges", json=BODY).json()["ranges"]
    request = SearchRequest.model_validate(examples.REQUEST)
    space = build_space(inventory, request.space, find_target("vllm"))
    costs = cost_tables(space, inventory)
    assert list(ranges) == ["avg_bits", "size_mb", "gbitops"]
    for name, scale in {"avg_bits": 1, "size_mb": 1e6, "gbitops": 1e9}.items():
        cost = costs[{"avg_bits": "avg_bits", "size_mb": "size_bytes", "gbitops": "bitops"}[name]]
        assert ranges[name]["least"] == pytest.approx(cost.smallest / scale, rel=1e-5)
        assert ranges[name]["most"] == pytest.approx(cost.largest / scale, rel=1e-5)
        assert list(ranges[name]["uniform"]) == ["w4a16g64", "w5a16g64", "w6a16g64", "w8a16g64"]
        assert ranges[name]["uniform"]["w4a16g64"] == ranges[name]["least"]
    assert ranges["size_mb"]["unit"] == "MB"


def test_the_least_of_a_range_is_the_smallest_budget_that_is_taken(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    for name, found in client.post("/v1/ranges", json=BODY).json()["ranges"].items():
        tight = client.post("/v1/searches", json=BODY | {"budgets": {name: found["least"]}})
        assert tight.status_code == 202, (name, tight.text)
        less = client.post("/v1/searches", json=BODY | {"budgets": {name: found["least"] * 0.999}})
        assert less.status_code == 422
        assert less.json()["accepted"]["minimum"] == found["least"]


def test_ranges_of_a_model_that_nobody_has_inspected_are_not_known(client: TestClient, engine: Engine) -> None:
    put_model(engine, "tiny", "somewhere", None)
    for model in ("tiny", "org/name"):
        assert client.post("/v1/ranges", json={"model": model}).json() == {"ranges": None}


def test_which_ids_others_have_searched_is_told_to_nobody(
    keyed: TestClient, engine: Engine, bearer: Callable[..., dict[str, str]]
) -> None:
    mine, other, admin = bearer("mine"), bearer("other"), bearer("admin", "admin")
    body = BODY | {"model": "org/name"}
    assert keyed.post("/v1/searches", json=body | {"budgets": {"avg_bits": 5}}, headers=mine).status_code == 202
    put_model(engine, "org/name", "hub:org/name", examples.encoder())

    def known(headers: dict[str, str]) -> bool:
        return keyed.post("/v1/ranges", json=body, headers=headers).json()["ranges"] is not None

    assert [known(headers) for headers in (mine, other, admin)] == [True, False, True]
    infeasible = body | {"budgets": {"avg_bits": 1}}
    answers = [keyed.post("/v1/searches", json=infeasible, headers=headers) for headers in (mine, other)]
    assert [answer.status_code for answer in answers] == [422, 202]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "unknown"}, "model"),
        ({"target": "abacus"}, "target"),
        ({"space": {"schemes": ["w4a16g256"]}}, "space.schemes"),
        ({"latency": {"profile": "a toaster"}}, "latency.profile"),
        ({"budgets": {"avg_bits": 5}}, "budgets"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, engine: Engine, change: dict[str, object], field: str) -> None:
    examples.store_model(engine)
    answer = client.post("/v1/ranges", json=BODY | change)
    assert (answer.status_code, answer.json()["field"]) == (422, field)
