from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, create_engine

from api.app import create_app
from api.problems import Problem
from search.metrics import METRICS
from tests.api import examples

BODY = {"model": "org/name", "budgets": {"avg_bits": 5}}


def post(**changes: Any) -> Callable[[TestClient], Any]:
    return lambda client: client.post("/v1/searches", json=BODY | changes)


def raw(content: bytes, content_type: str = "application/json") -> Callable[[TestClient], Any]:
    return lambda client: client.post("/v1/searches", content=content, headers={"Content-Type": content_type})


def get(path: str) -> Callable[[TestClient], Any]:
    return lambda client: client.get(path)


# request, status, field, a part of the detail or of what is accepted
CASES: dict[str, tuple[Callable[[TestClient], Any], int, str | None, str]] = {
    "unknown field": (post(budget={}), 422, "budget", "budgets"),
    "unknown budget": (post(budgets={"avg_bit": 4}), 422, "budgets.avg_bit", "size_mb"),
    "budget of zero": (post(budgets={"avg_bits": 0}), 422, "budgets.avg_bits", "greater than 0"),
    "budget in words": (post(budgets={"avg_bits": "four"}), 422, "budgets.avg_bits", "valid number"),
    "no budget": (post(budgets={}), 422, "budgets", "avg_bits"),
    "no budgets": (lambda client: client.post("/v1/searches", json={"model": "a"}), 422, "budgets", "required"),
    "path as model": (post(model="/etc/passwd"), 422, "model", "Hugging Face id"),
    "unknown scheme": (post(space={"schemes": ["w9a16"]}), 422, "space.schemes", "w4a16g64"),
    "unknown scheme in a pin": (post(space={"pin": {"*": "int4"}}), 422, "space.pin", "w4a16g64"),
    "empty pin pattern": (post(space={"pin": {"": "w4a16"}}), 422, "space.pin.", "match"),
    "unknown quantizer": (post(space={"quantizer": "best"}), 422, "space.quantizer", "'rtn' or 'mse'"),
    "unknown target": (post(target="toaster"), 422, "target", "vllm"),
    "unknown metric": (post(sensitivity=["luck"]), 422, "sensitivity.0", "hessian_trace"),
    "no metric": (post(sensitivity=[]), 422, "sensitivity", "sensitivity should have at least 1 item, not 0"),
    "long model": (post(model="m" * 300), 422, "model", "model should have at most 200 characters"),
    "too few samples": (post(calibration={"samples": 1}), 422, "calibration.samples", "greater than or equal to 2"),
    "list as body": (raw(b"[]"), 422, "body", "dictionary"),
    "no body": (raw(b""), 422, "body", "required"),
    "not JSON": (raw(b'{"model": '), 422, "body", "character 10"),
    "not UTF-8": (raw(b'{"model": "\xff"}'), 400, None, "UTF-8"),
    "half a surrogate pair": (raw(b'{"model": "\\ud800"}'), 422, None, ""),
    "not a number": (raw(b'{"model": "org/a", "budgets": {"avg_bits": NaN}}'), 422, "budgets.avg_bits", ""),
    "form": (raw(b"model=a", "application/x-www-form-urlencoded"), 422, "body", "application/json"),
    "huge": (raw(b" " * 1_000_001), 413, None, "larger"),
    "no such page": (get("/v2"), 404, None, "/v2"),
    "no such search": (get("/v1/searches/7"), 404, None, "search 7"),
    "no such search's events": (get("/v1/searches/7/events"), 404, None, "search 7"),
    "no such point": (get("/v1/searches/1/points/99"), 404, "number", "99"),
    "search of letters": (get("/v1/searches/abc"), 422, "search_id", "integer"),
    "search beyond bigint": (get(f"/v1/searches/{2**63}"), 422, "search_id", "less than"),
    "unknown state": (get("/v1/searches?state=lost"), 422, "state", "'queued'"),
    "unknown format": (get("/v1/searches/1/frontier?format=xls"), 422, "format", "'parquet'"),
    "unknown group": (get("/v1/searches/1/frontier?include=all"), 422, "include", "dominated"),
    "unknown export": (get("/v1/searches/1/points/4/config?format=toast"), 422, "format", "vllm"),
    "wrong method": (lambda client: client.delete("/v1/searches/1"), 405, None, "GET"),
}


@pytest.mark.parametrize("case", CASES)
def test_error_is_a_problem_that_names_field_and_remedy(client: TestClient, engine: Engine, case: str) -> None:
    examples.finished_search(engine)
    send, status, field, remedy = CASES[case]
    answer = send(client)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate(answer.json(), strict=True)
    assert problem.status == status
    assert problem.type.startswith("urn:bitfrontier:problem:")
    if field is not None:
        assert problem.field == field
    assert remedy in f"{problem.detail} {problem.accepted}"
    assert "Traceback" not in answer.text


def test_unknown_metric_is_answered_with_all_that_are_accepted(client: TestClient) -> None:
    problem = Problem.model_validate(client.post("/v1/searches", json=BODY | {"sensitivity": ["kl", "luck"]}).json())
    assert (problem.field, problem.value) == ("sensitivity.1", "luck")
    assert all(f"'{name}'" in problem.accepted for name in METRICS)


def test_several_errors_are_listed(client: TestClient) -> None:
    answer = client.post("/v1/searches", json={"model": "a b", "budgets": {"avg_bits": -1}, "x": 1})
    problem = Problem.model_validate(answer.json())
    assert problem.errors is not None
    assert {error.field for error in problem.errors} == {"model", "budgets.avg_bits", "x"}


def test_refused_value_is_not_echoed_at_length(client: TestClient) -> None:
    answer = client.post("/v1/searches", json=BODY | {"model": "m" * 100_000})
    assert len(answer.content) < 2000


def test_internal_error_tells_a_request_id_and_nothing_else(
    client: TestClient, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("the secret is 1234")

    client.app.get("/broken")(broken)  # type: ignore[attr-defined]
    with caplog.at_level(logging.ERROR):
        answer = client.get("/broken")
    problem = Problem.model_validate(answer.json())
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "1234" not in answer.text
    assert problem.request_id
    assert problem.request_id in caplog.text, "the log can be found by the id"


def test_browser_gets_a_page_and_the_interface_a_document(client: TestClient) -> None:
    html = {"Accept": "text/html,*/*"}
    page = client.get("/searches/7", headers=html)
    assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "there is no search 7" in page.text
    assert client.get("/v1/searches/7", headers=html).headers["content-type"] == "application/problem+json"


def test_database_away(client: TestClient) -> None:
    away = create_engine("postgresql+psycopg://nobody@/none?host=/nowhere")
    assert client.get("/readyz").json() == {"status": "ok"}
    client.app.state.engine = away  # type: ignore[attr-defined]
    for path in ("/readyz", "/v1/searches"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert Problem.model_validate(answer.json()).status == 503
        assert "retry-after" in answer.headers
    assert client.get("/healthz").status_code == 200, "alive all the same"


def test_openapi_documents_problems_and_examples(engine: Engine) -> None:
    document = create_app(engine).openapi()
    assert "HTTPValidationError" not in str(document), "no response but ours"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert list(response["content"]) == ["application/problem+json"], (path, method, status)
    schemas = document["components"]["schemas"]
    assert schemas["SearchRequest"]["examples"]
    assert schemas["Problem"]["examples"]
    for reference in {part for part in str(document).split("'") if part.startswith("#/components/schemas/")}:
        assert reference.rpartition("/")[2] in schemas
