"""Who may do what: every route behind the gate, keys and their scopes, owners, cookies, and pages of other sites."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, text, update
from starlette.routing import BaseRoute, Route

from api import followers, keyring
from api.app import create_app
from api.documents import Problem
from api.keyring import COOKIE
from db.keys import find_key, list_keys, revoke_key
from db.tables import SearchRow
from tests.api import examples
from tests.api.conftest import KEYS, OPEN
from tests.aside import PATIENCE

Bearer = Callable[..., dict[str, str]]

PUBLIC = {"/healthz", "/readyz", "/login", "/logout", "/static/plotly.min.js", "/static/{name}"}
PAGE = {"Accept": "text/html,*/*"}
BODY = {"model": "org/name", "budgets": {"avg_bits": 5}}


def operations(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of everything that `app` answers."""

    def walk(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
        for route in routes:
            if included := getattr(route, "original_router", None):
                yield from walk(included.routes)
                continue
            assert isinstance(route, Route), f"{route} is no plain route: say here how it is walked"
            for method in sorted(route.methods or ()):
                yield method, route.path

    yield from walk(app.routes)


def filled(path: str, search_id: int, number: int = 9) -> str:
    values = {"search_id": search_id, "number": number, "metric": "kl", "key": "0" * 16, "name": "chart.js"}
    return path.format(**values)


def own(engine: Engine, search_id: int, name: str) -> None:
    """Make a search one that the key `name` posted."""
    query = text("UPDATE searches SET key_id = (SELECT id FROM api_keys WHERE name = :name) WHERE id = :id")
    with engine.begin() as connection:
        connection.execute(query, {"name": name, "id": search_id})


def problem(answer: httpx.Response, status: int) -> Problem:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return Problem.model_validate(answer.json())


def test_every_route_but_the_public_ones_needs_a_key(keyed: TestClient, engine: Engine) -> None:
    search_id = examples.finished_search(engine)
    found = list(operations(keyed.app))  # type: ignore[arg-type]
    assert len(found) > 20
    assert ("GET", "/openapi.json") in found
    assert {path for _, path in found} >= PUBLIC
    for method, path in found:
        url = filled(path, search_id)
        if path in PUBLIC:
            assert keyed.request(method, url).status_code in (200, 303, 401), path
            continue
        # With a body that nobody should have read.
        answer = keyed.request(method, url, content=b"{" if method == "POST" else None)
        assert answer.status_code == 401, (method, path)
        assert method == "HEAD" or problem(answer, 401).type == "urn:bitfrontier:problem:unauthenticated"
        assert answer.headers["www-authenticate"] == "Bearer"
        if method == "GET" and not path.startswith("/v1/"):
            to_login = keyed.get(url, headers=PAGE)
            assert (to_login.status_code, to_login.headers["location"]) == (303, f"/login?next={quote(url, safe='')}")


def test_what_does_not_exist_needs_a_key_too(keyed: TestClient, bearer: Bearer) -> None:
    for path in ("/v1/searches/7", "/v2", "/static/../v1/searches", "/static//v1/searches", "/login/", "//login"):
        assert keyed.get(path).status_code == 401, path
    assert keyed.get("/v2", headers=bearer()).status_code == 404


def test_a_route_that_is_added_later_is_behind_the_gate(engine: Engine) -> None:
    app = create_app(engine, KEYS)
    app.get("/later")(lambda: "secret")
    with TestClient(app) as client:
        assert client.get("/later").status_code == 401


def test_search_of_another_key_is_not_found_anywhere(keyed: TestClient, engine: Engine, bearer: Bearer) -> None:
    mine, other, admin = bearer("mine"), bearer("other"), bearer("boss", "admin")
    search_id = examples.finished_search(engine)
    own(engine, search_id, "mine")
    routes = [(method, path) for method, path in operations(keyed.app) if "{search_id}" in path]  # type: ignore[arg-type]
    assert len(routes) >= 11
    for method, path in routes:
        url = filled(path, search_id)
        seen, missing = (keyed.request(method, filled(path, n), headers=other) for n in (search_id, 99))
        assert seen.status_code == missing.status_code == 404, (method, path)
        told = (answer.json()["detail"].replace("99", str(search_id)) for answer in (seen, missing))
        assert len(set(told)) == 1, "as if it did not exist"
        for allowed in (mine, admin):
            assert keyed.request(method, url, headers=allowed).status_code in (200, 303), (method, path)
    assert keyed.get("/v1/searches", headers=other).json()["searches"] == []
    assert f"/searches/{search_id}" not in keyed.get("/", headers=other | PAGE).text
    for allowed in (mine, admin):
        assert [found["id"] for found in keyed.get("/v1/searches", headers=allowed).json()["searches"]] == [search_id]
        assert f'href="/searches/{search_id}"' in keyed.get("/", headers=allowed | PAGE).text


def test_whose_results_were_reused_only_they_hear_who_may_see_them(
    keyed: TestClient, engine: Engine, bearer: Bearer
) -> None:
    mine, admin = bearer("mine"), bearer("boss", "admin")
    search_id = examples.finished_search(engine)
    own(engine, search_id, "mine")
    told = {"computed": 3, "reused": 4, "reused_from": [4711]}
    with engine.begin() as connection:
        connection.execute(update(SearchRow).values(summary=SearchRow.summary.op("||")(told)))
    for path in (f"/v1/searches/{search_id}", "/v1/searches", f"/searches/{search_id}"):
        assert "4711" not in keyed.get(path, headers=mine).text
        assert "4711" in keyed.get(path, headers=admin).text
    assert keyed.get(f"/v1/searches/{search_id}", headers=mine).json()["work"] == told | {"reused_from": []}


def test_search_that_was_started_without_a_key_is_the_admins(keyed: TestClient, engine: Engine, bearer: Bearer) -> None:
    search_id = examples.queued_search(engine)
    assert keyed.get(f"/v1/searches/{search_id}", headers=bearer("ci")).status_code == 404
    assert keyed.get(f"/v1/searches/{search_id}", headers=bearer("boss", "admin")).status_code == 200


def test_scopes(keyed: TestClient, engine: Engine, bearer: Bearer) -> None:
    examples.store_model(engine)
    read = bearer("reader", "read")
    refused = keyed.post("/v1/searches", json=examples.REQUEST, headers=read)
    assert problem(refused, 403).accepted == "write"
    assert 'error="insufficient_scope"' in refused.headers["www-authenticate"]
    assert keyed.post("/v1/searches/1/cancel", headers=read).status_code == 403
    for path in ("/v1/searches", "/v1/models", "/metrics", "/openapi.json", "/"):
        assert keyed.get(path, headers=read).status_code == 200, path
    for name in ("write", "admin"):
        headers = bearer(name, name)
        assert keyed.post("/v1/searches", json=examples.REQUEST, headers=headers).status_code == 202
        assert keyed.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "given",
    ["Bearer bf_wrong", "Bearer", "Bearer ", "bearer \xff\xfe", "Basic YTpi", "bf_wrong", "Bearer " + "x" * 10_000],
)
def test_wrong_keys(keyed: TestClient, given: str) -> None:
    answer = keyed.get("/v1/searches", headers=[(b"Authorization", given.encode("latin-1"))])
    assert problem(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert "bf_wrong" not in answer.text


def test_revoked_and_expired_keys_are_refused_within_seconds(
    keyed: TestClient, engine: Engine, bearer: Bearer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keyring.REMEMBER_SECONDS + followers.WAIT_SECONDS <= 5, "of a stream, too"
    monkeypatch.setattr(keyring, "REMEMBER_SECONDS", 0.2)
    headers = {name: bearer(name) for name in ("revoked", "expired", "kept")}
    assert {keyed.get("/v1/models", headers=sent).status_code for sent in headers.values()} == {200}
    revoke_key(engine, "revoked")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE api_keys SET expires_at = now() WHERE name = 'expired'")
    time.sleep(0.2)
    for name, status in (("revoked", 401), ("expired", 401), ("kept", 200)):
        answer = keyed.get("/v1/models", headers=headers[name])
        assert answer.status_code == status, name
    assert 'error="invalid_token"' in keyed.get("/v1/models", headers=headers["revoked"]).headers["www-authenticate"]


def test_a_key_costs_at_most_one_indexed_query_and_a_busy_one_hardly_any(
    keyed: TestClient, engine: Engine, bearer: Bearer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "REMEMBER_SECONDS", 3600.0)
    headers = bearer()
    find_key(engine, headers["Authorization"].split()[1])
    statements: list[str] = []

    def hear(*about: object) -> None:
        statements.append(str(about[2]))

    event.listen(engine, "before_cursor_execute", hear)
    try:
        for _ in range(20):
            assert keyed.get("/v1/schemes", headers=headers).status_code == 200
    finally:
        event.remove(engine, "before_cursor_execute", hear)
    assert len(statements) == 1, "remembered"
    assert all("WHERE api_keys.digest =" in statement for statement in statements)
    assert list_keys(engine)[0].last_used_at is not None


def test_revoked_key_loses_its_open_stream(
    keyed_served: str, engine: Engine, bearer: Bearer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "REMEMBER_SECONDS", 0.2)
    monkeypatch.setattr(followers, "WAIT_SECONDS", 0.2)
    headers = bearer()
    client = httpx.Client(base_url=keyed_served, headers=headers, timeout=20)
    search_id = client.post("/v1/searches", json=BODY).json()["id"]
    with client.stream("GET", f"/v1/searches/{search_id}/events") as stream:
        lines = stream.iter_lines()
        assert any('"queued"' in line for line in lines)
        revoke_key(engine, "ci")
        until = time.monotonic() + PATIENCE
        for line in lines:
            assert "data" not in line
            assert time.monotonic() < until, "what keeps an idle stream open comes still"
    assert client.get(f"/v1/searches/{search_id}/events").status_code == 401


def test_idempotency_key_is_the_api_keys_own(keyed: TestClient, bearer: Bearer) -> None:
    once = {"Idempotency-Key": "once"}
    first, second = bearer("first"), bearer("second")
    ids = [keyed.post("/v1/searches", json=BODY, headers=once | who).json()["id"] for who in (first, second, first)]
    assert ids[0] == ids[2] != ids[1]


def test_quota_of_open_searches(keyed: TestClient, bearer: Bearer) -> None:
    few, other = bearer("few", max_open=1) | {"Idempotency-Key": "a"}, bearer("other")
    assert keyed.post("/v1/searches", json=BODY, headers=few).status_code == 202
    refused = keyed.post("/v1/searches", json=BODY, headers=few | {"Idempotency-Key": "b"})
    assert problem(refused, 429).type == "urn:bitfrontier:problem:quota-exceeded"
    assert "1" in str(refused.json()["accepted"])
    assert int(refused.headers["retry-after"]) > 0
    assert keyed.post("/v1/searches", json=BODY, headers=few).status_code == 202, "a repeat is never refused"
    assert keyed.post("/v1/searches", json=BODY, headers=other).status_code == 202, "nor is another key"
    keyed.post("/v1/searches/1/cancel", headers=few)
    assert keyed.post("/v1/searches", json=BODY, headers=few | {"Idempotency-Key": "b"}).status_code == 202


def test_logging_in_sets_a_cookie_that_opens_the_pages(keyed: TestClient, bearer: Bearer) -> None:
    token = bearer("ada")["Authorization"].split()[1]
    assert 'name="next" value="/searches/1"' in keyed.get("/login?next=/searches/1").text
    answer = keyed.post("/login", data={"key": f" {token}\n", "next": "/searches/1"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/searches/1")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    page = keyed.get("/", headers=PAGE)
    assert (page.status_code, "Log out" in page.text, ">ada<" in page.text) == (200, True, True)
    assert token not in page.text
    out = keyed.post("/logout")
    assert (out.status_code, out.headers["location"]) == (303, "/login")
    assert keyed.get("/", headers=PAGE).status_code == 303


def test_cookie_is_secure_on_https(engine: Engine, bearer: Bearer) -> None:
    token = bearer()["Authorization"].split()[1]
    with TestClient(create_app(engine, KEYS), base_url="https://bits.example", follow_redirects=False) as client:
        assert "Secure" in client.post("/login", data={"key": token}).headers["set-cookie"]
        assert client.get("/", headers=PAGE).status_code == 200


def test_login_with_a_wrong_key_shows_the_form_again(keyed: TestClient) -> None:
    for content in (b"key=bf_wrong&next=/searches/1", b"", b"&" * 5000, b"key=\xff%ff", b'{"key": 1}'):
        answer = keyed.post("/login", content=content)
        assert answer.status_code == 401, content
        assert answer.headers["content-type"].startswith("text/html")
        assert 'role="alert"' in answer.text
        assert "set-cookie" not in answer.headers
        assert "bf_wrong" not in answer.text


@pytest.mark.parametrize(
    "next",
    [
        "https://evil.example",
        "javascript:alert(1)",
        "//evil.example",
        "/\\evil.example",
        "\\/evil.example",
        "/\t/evil.example",
        "evil",
        "",
    ],
)
def test_login_leads_to_no_other_site(keyed: TestClient, bearer: Bearer, next: str) -> None:
    token = bearer()["Authorization"].split()[1]
    assert keyed.post("/login", data={"key": token, "next": next}).headers["location"] == "/"
    assert 'name="next" value="/"' in keyed.get("/login", params={"next": next}).text


def test_link_from_another_site_is_asked_for_again_so_that_the_cookie_comes_along(keyed: TestClient) -> None:
    answer = keyed.get("/searches/1?a=%22%3E", headers=PAGE | {"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    assert '<meta http-equiv="refresh" content="0; url=/searches/1?a=%22%3E">' in answer.text
    again = keyed.get("/searches/1", headers=PAGE | {"Sec-Fetch-Site": "same-origin"})
    assert again.headers["location"] == "/login?next=%2Fsearches%2F1"


FOREIGN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "https://evil.example"},
    {"Origin": "http://testserver:3000"},
    {"Origin": "null"},
    {"Origin": "http://["},
    {"Origin": ""},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_pages_of_other_sites_change_nothing(
    client: TestClient, keyed: TestClient, engine: Engine, bearer: Bearer, headers: dict[str, str]
) -> None:
    search_id = examples.queued_search(engine)
    keyed.cookies.set(COOKIE, bearer("ada", "admin")["Authorization"].split()[1])
    for asked in (client, keyed):
        for path in (f"/v1/searches/{search_id}/cancel", f"/searches/{search_id}/cancel", "/login", "/logout"):
            refused = asked.post(path, headers=headers)
            assert problem(refused, 403).type == "urn:bitfrontier:problem:cross-site", path
        assert asked.get(f"/v1/searches/{search_id}", headers=headers).json()["state"] == "queued"


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"}, {}])
def test_cancel_on_the_page_works_with_the_cookie(keyed: TestClient, bearer: Bearer, headers: dict[str, str]) -> None:
    ada = bearer("ada")
    search_id = keyed.post("/v1/searches", json=BODY, headers=ada).json()["id"]
    keyed.cookies.set(COOKIE, ada["Authorization"].split()[1])
    action = f"/searches/{search_id}/cancel"
    assert f'action="{action}"' in keyed.get(f"/searches/{search_id}", headers=PAGE).text
    answer = keyed.post(action, headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/searches/{search_id}")
    assert keyed.get(f"/v1/searches/{search_id}").json()["state"] == "cancelled"


def test_who_may_only_read_is_offered_no_cancel(keyed: TestClient, engine: Engine, bearer: Bearer) -> None:
    headers = bearer("reader", "read")
    own(engine, examples.queued_search(engine), "reader")
    page = keyed.get("/searches/1", headers=headers | PAGE)
    assert (page.status_code, "/cancel" in page.text) == (200, False)


@pytest.mark.parametrize("host", ["localhost", "localhost:8400", "127.0.0.1:8400", "127.8.9.1", "[::1]", "LOCALHOST"])
def test_open_service_answers_to_its_own_machine(client: TestClient, host: str) -> None:
    assert client.get("/v1/searches", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7", "localhost@evil", "", "[::2]:80"],
)
def test_open_service_answers_to_no_name_that_another_site_may_have(client: TestClient, host: str) -> None:
    for path in ("/v1/searches", "/", "/healthz", "/openapi.json"):
        answer = client.get(path, headers={"Host": host})
        assert problem(answer, 421).field == "Host", path


def test_open_service_answers_to_the_names_it_is_given(engine: Engine) -> None:
    settings = OPEN.model_copy(update={"hosts": ("bits.lan",)})
    with TestClient(create_app(engine, settings)) as client:
        assert client.get("/v1/searches", headers={"Host": "Bits.lan:8400"}).status_code == 200
        assert client.get("/v1/searches").status_code == 421


def test_open_service_asks_for_no_login(client: TestClient) -> None:
    answer = client.get("/login?next=/searches/1", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/searches/1")
    assert "Log out" not in client.get("/").text
    assert client.get("/v1/searches", headers={"Authorization": "Bearer bf_unknown"}).status_code == 200


def test_no_token_reaches_the_log(
    keyed: TestClient, engine: Engine, bearer: Bearer, caplog: pytest.LogCaptureFixture
) -> None:
    good, wrong = bearer()["Authorization"].split()[1], "bf_wrong-but-somebody-elses-secret"
    with caplog.at_level(logging.DEBUG):
        for token in (good, wrong):
            keyed.get("/v1/searches", headers={"Authorization": f"Bearer {token}"})
            keyed.get("/", headers=PAGE | {"Cookie": f"{COOKIE}={token}"})
            keyed.post("/login", data={"key": token})
        engine.dispose()
    logged = caplog.text + str([record.__dict__ for record in caplog.records])
    assert good not in logged
    assert wrong not in logged


def test_service_without_any_key_says_how_to_make_one(
    engine: Engine, bearer: Bearer, caplog: pytest.LogCaptureFixture
) -> None:
    for settings, told in ((KEYS, True), (OPEN, False)):
        caplog.clear()
        with TestClient(create_app(engine, settings)):
            assert ("bitfrontier keys create NAME" in caplog.text) == told
    bearer()
    caplog.clear()
    with TestClient(create_app(engine, KEYS)):
        assert "bitfrontier keys create NAME" not in caplog.text


def test_openapi_says_how_to_send_a_key_and_which_routes_need_none(engine: Engine) -> None:
    document = create_app(engine, KEYS).openapi()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, described in document["paths"].items():
        for operation in described.values():
            assert operation["security"] == ([] if path in PUBLIC else [{"key": []}, {"cookie": []}]), path
            assert {"401", "403", "429"} <= set(operation["responses"])
    assert "security" not in str(create_app(engine, OPEN).openapi()), "an open service asks for none"


@pytest.mark.parametrize(
    ("headers", "offered"),
    [
        ({}, True),
        ({"Referer": "http://other.example/"}, True),
        ({"Referer": "http://testserver/searches/1"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
    ],
)
def test_going_on_without_a_key_is_offered_to_who_may_have_followed_a_link_from_elsewhere(
    keyed: TestClient, headers: dict[str, str], offered: bool
) -> None:
    wanted = {"next": "/searches/1"}
    assert ("Go on" in keyed.get("/login", params=wanted, headers=headers).text) is offered
    assert "Go on" not in keyed.get("/login", headers=headers).text
    wrong = keyed.post("/login", data=wanted | {"key": "bf_wrong"})
    assert wrong.status_code == 401
    assert "Go on" not in wrong.text
