from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text

from db.searches import get_search
from search.metrics import METRICS
from tests.api import examples


def test_create_answers_202_with_the_place_to_look(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    answer = client.post("/v1/searches", json=examples.REQUEST)
    assert answer.status_code == 202
    assert answer.headers["location"] == "/v1/searches/1"
    assert int(answer.headers["retry-after"]) > 0
    body = answer.json()
    assert (body["state"], body["budgets"]) == ("queued", {"avg_bits": 5.25, "size_mb": 40})
    assert body["request"]["optimizer"]["evaluations"] == 64, "defaults are filled in"
    assert client.get(body["links"]["self"]).json() == body


def test_idempotency_key_gives_the_same_search_once(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    headers = {"Idempotency-Key": "once"}
    first = client.post("/v1/searches", json=examples.REQUEST, headers=headers)
    again = client.post("/v1/searches", json=examples.REQUEST, headers=headers)
    assert first.json()["id"] == again.json()["id"]
    other = client.post("/v1/searches", json=examples.REQUEST | {"budgets": {"avg_bits": 6}}, headers=headers)
    assert (other.status_code, other.json()["field"]) == (422, "Idempotency-Key")
    assert len(client.get("/v1/searches").json()["searches"]) == 1


def test_a_repeated_request_is_not_looked_into_again(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    headers = {"Idempotency-Key": "once"}
    first = client.post("/v1/searches", json=examples.REQUEST, headers=headers)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM models"))
    again = client.post("/v1/searches", json=examples.REQUEST, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["location"] == first.headers["location"]
    assert client.post("/v1/searches", json=examples.REQUEST, headers={"Idempotency-Key": "new"}).status_code == 422
    other = client.post("/v1/searches", json=examples.REQUEST | {"budgets": {"avg_bits": 6}}, headers=headers)
    assert other.json()["field"] == "Idempotency-Key"


def test_unregistered_name_is_refused_with_the_registered_ones(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    problem = client.post("/v1/searches", json=examples.REQUEST | {"model": "all-minilm"}).json()
    assert (problem["status"], problem["field"], problem["value"]) == (422, "model", "all-minilm")
    assert examples.MODEL in problem["accepted"]
    hub = client.post("/v1/searches", json={"model": "org/name", "budgets": {"avg_bits": 5}})
    assert hub.status_code == 202, "a Hugging Face id need not be registered"


@pytest.mark.parametrize(
    ("budgets", "field"), [({"avg_bits": 3}, "budgets.avg_bits"), ({"size_mb": 5}, "budgets.size_mb")]
)
def test_infeasible_budget_is_refused_with_the_smallest(
    client: TestClient, engine: Engine, budgets: dict[str, float], field: str
) -> None:
    examples.store_model(engine)
    problem = client.post("/v1/searches", json=examples.REQUEST | {"budgets": budgets}).json()
    assert problem["type"] == "urn:bitfrontier:problem:infeasible-budget"
    assert problem["field"] == field
    name = field.removeprefix("budgets.")
    feasible = {name: problem["accepted"]["minimum"]}
    assert client.post("/v1/searches", json=examples.REQUEST | {"budgets": feasible}).status_code == 202


@pytest.mark.parametrize(
    ("pattern", "limit", "field", "accepted"),
    [
        ("*.output.dense", {"avg_bits": 4}, "budgets.limits.*.output.dense.avg_bits", "4.25"),
        ("*.down_proj", {"avg_bits": 6}, "budgets.limits.*.down_proj", "kind:linear"),
        ("*.query", {"size_mb": 9}, "budgets.limits.*.query", "attention.self.key"),
        ("kind:dense", {"size_mb": 9}, "budgets.limits", "embedding"),
    ],
)
def test_impossible_limit_is_refused(
    client: TestClient, engine: Engine, pattern: str, limit: dict[str, float], field: str, accepted: str
) -> None:
    examples.store_model(engine)
    budgets = {"avg_bits": 5.25, "limits": {pattern: limit}}
    answer = client.post("/v1/searches", json=examples.REQUEST | {"budgets": budgets})
    assert answer.status_code == 422
    assert answer.json()["field"] == field
    assert accepted in str(answer.json())


def test_impossible_space_is_refused(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    for space, field in (
        ({"pin": {"*.no_such": "w8a16g64"}}, "space.pin"),
        ({"schemes": ["w4a16g256"]}, "space.schemes"),
        ({"schemes": ["w4a4"]}, "space.schemes"),
    ):
        problem = client.post("/v1/searches", json=examples.REQUEST | {"space": space}).json()
        assert (problem["status"], problem["field"]) == (422, field), problem


def test_list_pages_filters_and_ends(client: TestClient, engine: Engine) -> None:
    ids = [examples.queued_search(engine) for _ in range(5)]
    client.post(f"/v1/searches/{ids[2]}/cancel")
    seen, cursor = [], None
    while True:
        page = client.get("/v1/searches", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [search["id"] for search in page["searches"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == sorted(ids, reverse=True)
    cancelled = client.get("/v1/searches", params={"state": "cancelled"}).json()["searches"]
    assert [search["id"] for search in cancelled] == [ids[2]]
    assert client.get("/v1/searches", params={"model": "other"}).json()["searches"] == []
    assert client.get("/v1/searches", params={"model": "\0"}).json()["searches"] == []


def test_cancel_is_idempotent_and_leaves_the_finished_alone(client: TestClient, engine: Engine) -> None:
    queued = examples.queued_search(engine)
    for _ in range(2):
        assert client.post(f"/v1/searches/{queued}/cancel").json()["state"] == "cancelled"
    running, _ = examples.claimed_search(engine)
    answer = client.post(f"/v1/searches/{running}/cancel").json()
    assert (answer["state"], answer["cancel_requested"]) == ("running", True)
    finished = examples.finished_search(engine)
    assert client.post(f"/v1/searches/{finished}/cancel").json()["state"] == "succeeded"
    assert not get_search(engine, finished).cancel_requested


def test_failed_search_carries_its_problem(client: TestClient, engine: Engine) -> None:
    problem = {"type": "urn:x", "title": "No", "status": 422, "detail": "three samples", "field": "calibration.samples"}
    failed = client.get(f"/v1/searches/{examples.failed_search(engine, problem)}").json()
    assert failed["state"] == "failed"
    assert failed["error"] | problem == failed["error"]


def test_catalog(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    (model,) = client.get("/v1/models").json()["models"]
    assert (model["name"], model["layers"]) == (examples.MODEL, 38)
    schemes = client.get("/v1/schemes").json()
    four = next(scheme for scheme in schemes["examples"] if scheme["scheme"] == "w4a16g64")
    assert four["bits_per_weight"] == 4.25
    targets = client.get("/v1/targets").json()
    assert {"generic", "llama.cpp", "onnxruntime", "vllm"} == {target["name"] for target in targets["targets"]}
    assert {"json", "vllm"} <= {export["name"] for export in targets["exports"]}


def test_metrics_say_what_they_need_and_mean(client: TestClient) -> None:
    metrics = {metric["name"]: metric for metric in client.get("/v1/metrics").json()["metrics"]}
    assert list(metrics) == list(METRICS)
    assert metrics["weight_mse"] == {
        "name": "weight_mse",
        "title": METRICS["weight_mse"].title,
        "evidence": "weights",
        "needs": ["weights"],
        "in_loss_units": False,
        "sees_activations": False,
    }
    assert "labels" in metrics["hessian_trace_labels"]["needs"]
    for name in metrics:
        body = {"model": "org/name", "budgets": {"avg_bits": 16}, "sensitivity": [name]}
        assert client.post("/v1/searches", json=body).status_code == 202, name


def test_every_example_scheme_is_accepted(client: TestClient) -> None:
    for scheme in client.get("/v1/schemes").json()["examples"]:
        body = {"model": "org/name", "budgets": {"avg_bits": 16}, "space": {"schemes": [scheme["scheme"]]}}
        assert client.post("/v1/searches", json=body).status_code == 202
