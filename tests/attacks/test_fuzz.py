"""Whatever is sent: a problem document that names the field, no harm done, and the next request is answered."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.attacks import corpus
from tests.attacks.conftest import all_refused

JSON = {"Content-Type": "application/json"}
SEARCH_ROUTES = (
    "/v1/searches/{}", "/v1/searches/{}/events", "/v1/searches/{}/frontier", "/v1/searches/{}/sensitivities",
    "/v1/searches/{}/points/4", "/v1/searches/1/points/{}", "/v1/searches/{}/points/4/config",
    "/v1/searches/1/points/{}/config", "/searches/{}", "/searches/{}/points/4", "/searches/1/points/{}",
    "/searches/{}/sensitivities/kl",
)  # fmt: skip
QUERIES = {
    "/v1/searches": ("limit", "cursor", "state"),
    "/v1/searches/1/events": ("after",),
    "/v1/searches/1/frontier": ("format", "include", "under"),
    "/v1/searches/1/sensitivities": ("format",),
    "/v1/searches/1/points/4/config": ("format",),
    "/": ("cursor",),
}
HARMLESS = (
    "X-Request-Id", "If-None-Match", "Accept", "Accept-Encoding", "Cookie", "Authorization", "Referer", "User-Agent",
    "Range", "X-Forwarded-For", "X-Forwarded-Host", "X-HTTP-Method-Override", "Forwarded", "X-Original-URL",
)  # fmt: skip
"""Headers that may hold anything."""

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("unharmed")]


@pytest.mark.parametrize("case", corpus.BODIES)
def test_no_body_but_a_search_request_is_taken(attacked: TestClient, case: str) -> None:
    all_refused({case: lambda: attacked.post("/v1/searches", content=corpus.BODIES[case], headers=JSON)})


def test_a_search_request_is_taken_as_json_only(attacked: TestClient) -> None:
    for name, values in (("Content-Type", corpus.CONTENT_TYPES), ("Content-Encoding", corpus.ENCODINGS)):
        all_refused({value: lambda name=name, value=value: post(attacked, name, value) for value in values})


def post(client: TestClient, header: str, value: str) -> httpx.Response:
    return client.post("/v1/searches", content=corpus.BODY, headers=JSON | {header: value.encode("latin-1")})


def test_every_value_that_the_schema_forbids_is_refused_by_the_name_of_its_field(attacked: TestClient) -> None:
    """Every field of the search request × every kind of wrong value."""
    found, tried = {}, 0
    for path, body in corpus.wrong_requests():
        answer = attacked.post("/v1/searches", content=json.dumps(body), headers=JSON)
        tried += 1
        problem = answer.json()
        named = {problem.get("field")} | {error["field"] for error in problem.get("errors") or ()}
        # A pattern is named together with what is wrong at it.
        if answer.status_code != 422 or not any(field and _same(field, path) for field in named):
            found[path, str(problem.get("value"))[:50]] = (answer.status_code, named, problem.get("detail", "")[:100])
    assert tried > 400
    assert not found


def _same(field: str, path: str) -> bool:
    return field.startswith(path) or path.startswith(field)


@pytest.mark.parametrize("route", SEARCH_ROUTES)
def test_ids_are_written_one_way(attacked: TestClient, route: str) -> None:
    assert attacked.get(route.format(1)).status_code == 200 or "points" in route
    # "0" is a point; with a slash, the path would be another.
    sent = [
        number for number in corpus.NUMBERS if number and "/" not in number and (number != "0" or "s/1/" not in route)
    ]
    paths = {number: route.format(quote(number)) for number in sent}
    all_refused({number: lambda path=path: attacked.get(path) for number, path in paths.items()})


@pytest.mark.parametrize("route", QUERIES)
def test_queries_are_taken_by_the_letter(attacked: TestClient, route: str) -> None:
    for name in QUERIES[route]:
        # An empty list is one, and so is the cursor from which everything is told.
        numbers = [number for number in corpus.NUMBERS if number not in ("", "0")]
        sent = [*numbers, *corpus.TEXTS.values(), *corpus.ESCAPES[:20], "x" * 60_000]
        queries = {given[:99]: {name: given} for given in sent}
        if route.startswith("/v1"):
            queries |= {"twice": {name: ["1", "1"]}, "misspelt": {f"{name}[]": "1"}}
        all_refused({case: lambda query=query: attacked.get(route, params=query) for case, query in queries.items()})


def test_headers_are_refused_or_harmless(attacked: TestClient) -> None:
    texts = [text for text in corpus.TEXTS.values() if text.isascii()]
    keys = [text for text in [*texts, "é", "\xff", "a b", "", "k" * 201] if not re.fullmatch("[!-~]{1,200}", text)]
    all_refused({key[:99]: lambda key=key: post(attacked, "Idempotency-Key", key) for key in keys})
    numbers = [number for number in corpus.NUMBERS if number.isascii() and number != "0"]
    follow = "/v1/searches/1/events"
    all_refused({last: lambda last=last: attacked.get(follow, headers={"Last-Event-ID": last}) for last in numbers})
    for name in HARMLESS:
        for text in texts:
            answer = attacked.get("/v1/searches/1", headers={name: text.encode("latin-1")})
            assert answer.status_code == 200, (name, text)
            assert "hacked" not in str(answer.headers)
            assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])


def test_every_method_but_the_routes_own_is_refused(attacked: TestClient) -> None:
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "FOO"):
        for path in ("/v1/searches", "/v1/searches/1", "/v1/models", "/metrics", "/", "/login"):
            answer = attacked.request(method, path)
            assert answer.status_code == 405, (method, path)
            assert set(answer.json()["accepted"]) == set(answer.headers["allow"].split(", "))


@pytest.mark.parametrize("text", corpus.TEXTS.values(), ids=corpus.TEXTS)
def test_texts_filter_nothing_in_and_run_nowhere(attacked: TestClient, text: str) -> None:
    """A filter takes any text: no search has a model of that name."""
    answer = attacked.get("/v1/searches", params={"model": text})
    assert answer.status_code == 422 if len(text) > 200 else answer.json()["searches"] == []
    all_refused({"a path": lambda: attacked.get(f"/v1/{quote(text[:5000])}")}, sent=text)
    all_refused({"a form": lambda: attacked.get(f"/searches/1/sensitivities/{quote(text[:5000], safe='')}")}, sent=text)
