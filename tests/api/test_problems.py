from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.app import create_app
from api.documents import Problem
from search.metrics import METRICS
from tests.api import examples
from tests.api.conftest import OPEN

BODY = {"model": "org/name", "budgets": {"avg_bits": 5}}


def post(**changes: Any) -> Callable[[TestClient], Any]:
    return lambda client: client.post("/v1/searches", json=BODY | changes)


def raw(content: bytes, content_type: str = "application/json") -> Callable[[TestClient], Any]:
    return lambda client: client.post("/v1/searches", content=content, headers={"Content-Type": content_type})


def get(path: str) -> Callable[[TestClient], Any]:
    return lambda client: client.get(path)


def events_from(event: str) -> Callable[[TestClient], Any]:
    return lambda client: client.get("/v1/searches/1/events", headers={"Last-Event-ID": event})


def with_key(key: str) -> Callable[[TestClient], Any]:
    return lambda client: client.post("/v1/searches", json=BODY, headers={"Idempotency-Key": key})


@pytest.fixture(scope="module")
def searched(migrated_engine: Engine) -> Iterator[TestClient]:
    """The application with one finished search, for requests that change nothing."""
    with migrated_engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE searches, results RESTART IDENTITY CASCADE")
    with TestClient(create_app(migrated_engine, OPEN), raise_server_exceptions=False) as client:
        examples.finished_search(migrated_engine)
        yield client


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
    "not UTF-8": (raw(b'{"model": "\xff"}'), 400, "body", "UTF-8"),
    "UTF-16": (raw('{"model": "m"}'.encode("utf-16")), 400, "body", "UTF-8"),
    "deep JSON": (raw(b"[" * 100_000 + b"]" * 100_000), 422, "body", "nested too deeply"),
    "rather deep JSON": (raw(b'{"x": ' + b"[" * 400 + b"]" * 400 + b"}"), 422, None, "x is not a field"),
    "a field twice": (raw(b'{"model": "a", "model": "b", "budgets": {"avg_bits": 5}}'), 422, "model", "twice"),
    "thousands of digits": (raw(b'{"budgets": {"avg_bits": ' + b"9" * 5000 + b"}}"), 422, "body", "digits"),
    "hundreds of digits": (post(budgets={"avg_bits": 10**400}), 422, "budgets.avg_bits", "number"),
    "beyond floats": (raw(b'{"model": "a", "budgets": {"avg_bits": 1e999}}'), 422, "budgets.avg_bits", "finite"),
    "infinity": (raw(b'{"model": "a", "budgets": {"avg_bits": -Infinity}}'), 422, "budgets.avg_bits", "finite"),
    "a number in quotes": (post(calibration={"samples": "32"}), 422, "calibration.samples", "valid integer"),
    "true for a number": (post(budgets={"avg_bits": True}), 422, "budgets.avg_bits", "valid number"),
    "NUL in a pattern": (post(space={"ignore": ["a\0b"]}), 422, "space.ignore.0", ""),
    "half a surrogate pair as target": (raw(b'{"model": "a", "target": "\\ud83d"}'), 422, "body", "surrogate"),
    "a whole surrogate pair": (raw(b'{"model": "a", "target": "\\ud83d\\ude00"}'), 422, None, "not a target"),
    "half a surrogate pair in a name": (raw(b'{"model": "a", "space": {"pin": {"\\udc00": "w4a16"}}}'), 422, None, ""),
    "half a surrogate pair": (raw(b'{"model": "\\ud800"}'), 422, None, ""),
    "not a number": (raw(b'{"model": "org/a", "budgets": {"avg_bits": NaN}}'), 422, "budgets.avg_bits", ""),
    "form": (raw(b"model=a", "application/x-www-form-urlencoded"), 415, "Content-Type", "application/json"),
    "no type": (raw(b"{}", ""), 415, "Content-Type", "application/json"),
    "many unknown fields": (post(**{f"x{n}": 1 for n in range(50)}), 422, None, "50 fields are not accepted, of which"),
    "misspelt parameter": (get("/v1/searches/1/frontier?fromat=csv"), 422, "fromat", "format"),
    "parameter twice": (get("/v1/searches?limit=1&limit=2"), 422, "limit", "2 times"),
    "last event of letters": (events_from("abc"), 422, "last-event-id", "integer"),
    "key with a space": (with_key("a b"), 422, "idempotency-key", "match"),
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
def test_error_is_a_problem_that_names_field_and_remedy(searched: TestClient, case: str) -> None:
    send, status, field, remedy = CASES[case]
    answer = send(searched)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate(answer.json(), strict=True)
    assert problem.status == status
    assert problem.type.startswith("urn:bitfrontier:problem:")
    if field is not None:
        assert problem.field == field
    assert remedy in f"{problem.detail} {problem.accepted}"
    assert problem.request_id == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert len(answer.content) < 12_000


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


def test_browser_gets_a_page_and_the_interface_a_document(client: TestClient) -> None:
    html = {"Accept": "text/html,*/*"}
    page = client.get("/searches/7", headers=html)
    assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "there is no search 7" in page.text
    assert client.get("/v1/searches/7", headers=html).headers["content-type"] == "application/problem+json"


def test_openapi_documents_problems_and_examples(engine: Engine) -> None:
    document = create_app(engine).openapi()
    assert "HTTPValidationError" not in str(document), "no response but ours"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses = {int(status) for status in operation["responses"]}
            assert {401, 403, 421, 422, 429, 500, 503} <= statuses, path
            assert ({400, 408, 413, 415} <= statuses) == ("requestBody" in operation), path
            is_read = method == "get" and path.startswith("/v1/") and not path.endswith("/events")
            assert (304 in statuses) == is_read, path
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert list(response["content"]) == ["application/problem+json"], (path, method, status)
    schemas = document["components"]["schemas"]
    assert schemas["SearchRequest"]["examples"]
    assert schemas["Problem"]["examples"]
    for reference in {part for part in str(document).split("'") if part.startswith("#/components/schemas/")}:
        assert reference.rpartition("/")[2] in schemas
