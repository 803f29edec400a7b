from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from api.pages.form import document_of, errors_by_field, fields_of, new_fields
from db.keys import create_key
from db.searches import get_search, list_searches
from search.request import SearchRequest
from tests.api import examples

FULL = {
    "model": "org/name",
    "target": "vllm",
    "calibration": {"dataset": "digits", "samples": 16, "sequence_length": 64, "seed": 3},
    "space": {
        "schemes": ["w4a16g64", "w8a8"],
        "quantizer": "mse",
        "ignore": ["*.classifier", "a=b"],
        "pin": {"*.down_proj": "w8a16g64", "x = y": "w4a16"},
        "granularity": "block",
    },
    "budgets": {"avg_bits": 4.25, "latency_ms": 12.5, "limits": {"kind:embedding": {"size_mb": 20, "avg_bits": 8}}},
    "latency": {"profile": "NVIDIA H100 80GB HBM3", "tokens": 16},
    "sensitivity": ["kl", "fisher"],
    "optimizer": {"method": "ilp", "objective": "loss", "points": 3, "evaluations": 9},
}


@pytest.mark.parametrize("body", [FULL, {"model": "m", "budgets": {"size_mb": 1234567.5}}, examples.REQUEST])
def test_a_request_comes_back_from_its_form_as_it_was(body: dict[str, Any]) -> None:
    request = SearchRequest.model_validate(body)
    fields = fields_of(request.model_dump(mode="json"))
    assert SearchRequest.model_validate(document_of(fields)) == request


def test_a_new_form_asks_for_the_defaults() -> None:
    request = SearchRequest.model_validate(document_of(new_fields("m")))
    assert request == SearchRequest.model_validate({"model": "m", "budgets": {"avg_bits": 5.25}})
    cleared = SearchRequest.model_validate(document_of(new_fields("m") | {"space.ignore": "", "optimizer.points": " "}))
    assert cleared.space.ignore == ()
    assert cleared.optimizer.points == 20


@given(st.dictionaries(st.sampled_from(list(new_fields("m"))), st.text(max_size=30)))
def test_whatever_is_written_is_a_document_or_has_its_errors_named(fields: dict[str, str]) -> None:
    assert isinstance(document_of(fields), dict)


def test_errors_stand_at_the_nearest_field() -> None:
    def place(field: str) -> str:
        return next(iter(errors_by_field({"detail": "no", "field": field})))

    assert place("budgets.avg_bits") == "budgets.avg_bits"
    assert place("space.schemes.0") == "space.schemes"
    assert place("budgets.limits.*.fc2.avg_bits") == "budgets.limits"
    assert place("budgets") == "budgets"
    assert place("latency") == "latency.profile"
    assert place("max_open") == ""


def test_a_form_that_is_sent_twice_starts_one_search(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    form = {"model": examples.MODEL, "budgets.avg_bits": "5", "nonce": "once"}
    for _ in range(2):
        answer = client.post("/searches/new", data=form, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/searches/1")
    changed = client.post("/searches/new", data=form | {"budgets.avg_bits": "6"}, follow_redirects=False)
    newest = list_searches(engine, limit=9)[0]
    assert changed.headers["location"] == f"/searches/{newest.id}"
    assert get_search(engine, newest.id).request["budgets"]["avg_bits"] == 6


def test_what_cannot_be_started_is_shown_with_what_was_written(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    form = {"model": examples.MODEL, "budgets.avg_bits": "3", "space.pin": "<b> = w8a16g64"}
    answer = client.post("/searches/new", data=form)
    assert answer.status_code == 422
    assert "matches no searched layer" in answer.text
    assert "&lt;b&gt; = w8a16g64" in answer.text
    assert client.post("/searches/new", content="&".join(["a=b"] * 300)).status_code == 422
    assert list_searches(engine, limit=9) == []


def test_only_who_may_start_searches_is_offered_to(keyed: TestClient, bearer: Callable[..., dict[str, str]]) -> None:
    reader, writer = bearer("reader", "read"), bearer("writer", "write")
    html = {"Accept": "text/html"}
    assert "New search" not in keyed.get("/", headers=reader | html).text
    assert "New search" in keyed.get("/", headers=writer | html).text
    assert keyed.post("/searches/new", data={"model": "m"}, headers=reader).status_code == 403
    assert keyed.post("/searches/new", data={"model": "m"}).status_code == 401


def test_a_form_of_another_site_starts_nothing(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    form = {"model": examples.MODEL, "budgets.avg_bits": "5"}
    for headers in ({"Origin": "https://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.post("/searches/new", data=form, headers=headers).status_code == 403
    assert list_searches(engine, limit=9) == []


def test_a_key_clones_its_own_searches_only(
    keyed: TestClient, engine: Engine, bearer: Callable[..., dict[str, str]]
) -> None:
    mine, token = create_key(engine, "mine", {"write"})
    examples.store_model(engine)
    own = {"Authorization": f"Bearer {token}"}
    form = {"model": examples.MODEL, "budgets.avg_bits": "5"}
    assert keyed.post("/searches/new", data=form, headers=own).status_code == 303
    assert get_search(engine, 1).key_id == mine.id
    assert keyed.get("/searches/new?from=1", headers=own).status_code == 200
    assert keyed.get("/searches/new?from=1", headers=bearer("other")).status_code == 404


def test_a_part_that_is_asked_for_after_the_login_has_ended_reloads_the_page(keyed: TestClient) -> None:
    answer = keyed.get("/searches/1/progress", headers={"Accept": "text/html", "HX-Request": "true"})
    assert (answer.status_code, answer.headers["hx-refresh"]) == (200, "true")
