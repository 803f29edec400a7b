"""Nobody gets in without a key that is in force, and nobody sees or does with one what it is not for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text

from api.app import create_app
from api.keyring import COOKIE
from api.rates import FAILURES_PER_MINUTE
from db.keys import create_key, revoke_key
from db.models import put_model
from tests.api import examples
from tests.api.conftest import KEYS, OPEN
from tests.attacks.conftest import all_refused, api_process, state
from tests.attacks.corpus import ESCAPES, TEXTS

BODY = {"model": "org/name", "budgets": {"avg_bits": 5}}
BODY_TEXT = json.dumps(BODY)
PAGE = {"Accept": "text/html"}
SEARCH_ROUTES = (
    "", "/events", "/frontier", "/frontier?format=csv", "/frontier?format=html", "/sensitivities", "/points/4",
    "/points/4/config",
)  # fmt: skip
PAGES = ("", "/points/4", "/sensitivities/kl")

Make = Callable[..., str]


@pytest.fixture
def keyed(engine: Engine) -> Iterator[TestClient]:
    """A client of a service that asks for keys, with a finished search that no key of these tests posted."""
    examples.finished_search(engine)
    with TestClient(create_app(engine, KEYS), raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


@pytest.fixture
def make(engine: Engine) -> Make:
    """Makes a key; its token."""
    return lambda name, scope="write", **limits: create_key(engine, name, {scope}, **limits)[1]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def cookie(token: str) -> dict[str, str]:
    return {"Cookie": f"{COOKIE}={token}"}


def fresh(client: TestClient) -> None:
    """Forget the failures of this address."""
    client.app.state.keyring.__init__()  # type: ignore[attr-defined]


def test_no_wrong_key_opens_anything(keyed: TestClient, engine: Engine, make: Make) -> None:
    good, revoked, expired = make("good"), make("revoked"), make("expired")
    revoke_key(engine, "revoked")
    with engine.begin() as connection:
        connection.execute(text("UPDATE api_keys SET expires_at = now() - interval '1 second' WHERE name = 'expired'"))
    digest = hashlib.sha256(good.encode()).hexdigest()
    wrong = [
        revoked, expired, digest, good[:-1], good + "x", good.swapcase(), good[3:], good.replace("bf_", "BF_"),
        f"{good},{good}", f"{good} {good}", f"{good}\0", "good", "1", "*", "null", "undefined", "true",
        "bf_", "bf_" + "A" * 43, "bf_" + "x" * 50_000, "\xff\xfe", "bf_\xe9",
        *(words for words in TEXTS.values() if words.isascii()), *ESCAPES[:9],
    ]  # fmt: skip
    before = state(engine)
    for token in wrong:
        for headers in (bearer(token), cookie(token), bearer(token) | cookie(good)):
            sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            for method, path in (
                ("GET", "/v1/searches"),
                ("POST", "/v1/searches"),
                ("GET", "/metrics"),
                ("POST", "/v1/searches/1/cancel"),
            ):
                answer = keyed.request(method, path, headers=sent)
                assert answer.status_code in (401, 403, 429), (token[:60], headers.keys(), answer.status_code)
                assert len(token) < 8 or token not in answer.text
        fresh(keyed)
    assert state(engine) == before
    assert keyed.get("/v1/searches", headers=bearer(good)).status_code == 200
    assert keyed.get("/v1/searches", headers=cookie(good)).status_code == 200


def test_other_places_for_a_key_open_nothing(keyed: TestClient, make: Make) -> None:
    good = make("good", "admin")
    for headers in (
        {"X-API-Key": good},
        {"Authorization": good},
        {"Authorization": f"Basic {good}"},
        {"Cookie": f"key={good}"},
    ):
        assert keyed.get("/v1/searches", headers=headers).status_code == 401
    for query in ("key", "token", "access_token", COOKIE):
        assert keyed.get("/v1/searches", params={query: good}).status_code == 401
    twice = [(b"Authorization", b"Bearer bf_wrong"), (b"Authorization", f"Bearer {good}".encode())]
    assert keyed.get("/v1/searches", headers=twice).status_code == 401, "the first of two counts"


SPELLINGS = (
    "/static/../v1/searches", "/static/%2e%2e/v1/searches", "/healthz/../v1/searches", "/healthz/",
    "/healthz/v1/searches", "/login/../v1/searches", "//v1/searches", "/v1//searches", "/V1/searches",
    "/v1/searches/", "/v1/searches;/healthz", "/v1/searches%3f/healthz", "/v1/searches%23/healthz",
    "/static/x/../../v1/searches", "/static/a%2fb", "/static/%2e%2e%2fv1", "/./v1/searches", "/%76%31/searches",
    "/v1/searches%00", "/v1/searches/1%2fcancel", "/login%0a", "/metrics/", "/openapi.json/",
)  # fmt: skip


def test_no_spelling_of_a_path_goes_round_the_gate(keyed: TestClient) -> None:
    headers = {"X-Original-URL": "/healthz", "X-Rewrite-URL": "/login", "X-Forwarded-Prefix": "/static"}
    for path in SPELLINGS:
        answer = keyed.get(path, headers=headers)
        assert answer.status_code in (401, 404), path
        assert "searches" not in answer.json()


def test_no_host_goes_round_the_gate(keyed: TestClient) -> None:
    for host in ("x/healthz?", "x/login#", "x/static/a?", "", "x:8400/healthz", "/healthz"):
        for path in ("/v1/searches", "/metrics", "/openapi.json"):
            assert keyed.get(path, headers={"Host": host}).status_code == 401


def test_search_of_another_key_is_nowhere(keyed: TestClient, engine: Engine, make: Make) -> None:
    mine, theirs = make("mine"), make("theirs", "write")
    posted = keyed.post("/v1/searches", json=BODY | {"model": "secret/model"}, headers=bearer(mine)).json()["id"]
    with engine.begin() as connection:
        connection.execute(text("UPDATE searches SET key_id = (SELECT id FROM api_keys WHERE name = 'mine')"))
    for search_id in (1, posted):
        for headers in (bearer(theirs), cookie(theirs)):
            for path in [f"/v1/searches/{search_id}{tail}" for tail in SEARCH_ROUTES] + [
                f"/searches/{search_id}{tail}" for tail in PAGES
            ]:
                assert keyed.get(path, headers=headers).status_code == 404, path
            for path in (f"/v1/searches/{search_id}/cancel", f"/searches/{search_id}/cancel"):
                assert keyed.post(path, headers=headers).status_code == 404
    # Nor by what is listed, counted, filtered for, or known to have been answered before.
    for path in (
        "/v1/searches",
        "/v1/searches?model=secret/model",
        "/v1/searches?state=queued&cursor=99",
        "/",
        "/metrics",
        "/v1/models",
    ):
        answer = keyed.get(path, headers=bearer(theirs) | PAGE)
        assert answer.status_code == 200
        assert "secret/model" not in answer.text
        assert "mine" not in answer.text
    tag = keyed.get("/v1/searches/1", headers=bearer(mine)).headers["etag"]
    assert keyed.get("/v1/searches/1", headers=bearer(theirs) | {"If-None-Match": tag}).status_code == 404
    assert keyed.get("/v1/searches/1", headers=bearer(theirs) | {"If-None-Match": "*"}).status_code == 404
    assert keyed.get(f"/v1/searches/{posted}", headers=bearer(mine)).json()["state"] == "queued"


def test_what_others_searched_by_id_is_listed_for_admins_only(keyed: TestClient, engine: Engine, make: Make) -> None:
    put_model(engine, "secret/model", "hub:secret/model", None)
    put_model(engine, "ours", "hub:org/public", None)
    writer, admin = bearer(make("writer")), bearer(make("admin", "admin"))
    answers = [keyed.get("/v1/models", headers=headers).json()["models"] for headers in (writer, admin)]
    names = [{model["name"] for model in models} for models in answers]
    assert names == [{examples.MODEL, "ours"}, {examples.MODEL, "ours", "secret/model"}]
    refused = keyed.post("/v1/searches", json=BODY | {"model": "secret"}, headers=writer)
    assert refused.status_code == 422
    assert "ours" in refused.text
    assert "secret/model" not in refused.text


def test_idempotency_key_of_another_tells_nothing(keyed: TestClient, make: Make) -> None:
    mine, theirs = bearer(make("mine")), bearer(make("theirs"))
    first = keyed.post("/v1/searches", json=BODY, headers=mine | {"Idempotency-Key": "k"})
    other = keyed.post("/v1/searches", json=BODY | {"model": "a/b"}, headers=theirs | {"Idempotency-Key": "k"})
    assert (first.status_code, other.status_code) == (202, 202), "no conflict with what they cannot know of"
    assert first.json()["id"] != other.json()["id"]


def test_no_scope_grows(keyed: TestClient, engine: Engine, make: Make) -> None:
    reader = bearer(make("reader", "read"))
    before = state(engine)
    for headers in ({}, {"X-HTTP-Method-Override": "GET"}, {"X-Scope": "admin"}, {"Idempotency-Key": "k"}):
        all_refused({
            path: lambda path=path, headers=headers: keyed.post(path, json=BODY | {"scopes": ["admin"]},
            headers=reader | headers) for path in ("/v1/searches", "/v1/searches?scope=write", "/v1/searches/1/cancel",
            "/searches/1/cancel", "/v1/keys")
        })  # fmt: skip
    for method in ("PUT", "PATCH", "DELETE", "GETX", "TRACE"):
        assert keyed.request(method, "/v1/searches/1", headers=reader).status_code == 403
    assert keyed.get("/v1/searches/1", headers=reader | {"X-HTTP-Method-Override": "POST"}).status_code == 404
    assert {name: value for name, value in state(engine).items() if name != "api_keys"} == {
        name: value for name, value in before.items() if name != "api_keys"
    }


@pytest.mark.usefixtures("clock")
def test_guessing_keys_is_slow_and_locks_out_nobody_who_has_one(keyed: TestClient, make: Make) -> None:
    good = bearer(make("good"))
    assert keyed.get("/v1/searches", headers=good).status_code == 200
    answers = [keyed.get("/v1/searches", headers=bearer(f"bf_{guess}")) for guess in range(FAILURES_PER_MINUTE + 5)]
    assert [answer.status_code for answer in answers] == [401] * FAILURES_PER_MINUTE + [429] * 5
    assert int(answers[-1].headers["retry-after"]) >= 1
    # By the form, and by another address that the client makes up, too.
    assert keyed.post("/login", data={"key": "bf_x"}).status_code == 429
    assert keyed.get("/v1/searches", headers=bearer("bf_x") | {"X-Forwarded-For": "1.2.3.4"}).status_code == 429
    assert keyed.get("/v1/searches", headers=good).status_code == 200


@pytest.mark.usefixtures("engine")
def test_no_address_that_a_client_makes_up_is_believed_as_deployed(postgres_url: str) -> None:
    with api_process(postgres_url, BITFRONTIER_AUTH="keys") as (port, _), httpx.Client() as client:
        guesses = [bearer("bf_x") | {"X-Forwarded-For": f"10.0.0.{at}"} for at in range(2 * FAILURES_PER_MINUTE)]
        address = f"http://127.0.0.1:{port}/v1/searches"
        answers = [client.get(address, headers=headers).status_code for headers in guesses]
    # The end of a minute of that process's clock may give some back.
    assert answers[:FAILURES_PER_MINUTE] == [401] * FAILURES_PER_MINUTE
    assert 429 in answers[FAILURES_PER_MINUTE:]


@pytest.mark.usefixtures("clock")
def test_a_busy_key_takes_nothing_from_another(keyed: TestClient, make: Make) -> None:
    busy, other = bearer(make("busy", rate_per_minute=3, max_open=1)), bearer(make("other"))
    statuses = [keyed.post("/v1/searches", json=BODY, headers=busy).status_code for _ in range(5)]
    assert statuses == [202, 429, 429, 429, 429]
    kinds = [keyed.post("/v1/searches", json=BODY, headers=busy).json()["type"] for _ in range(2)]
    assert {kind.rpartition(":")[2] for kind in kinds} == {"too-many-requests"}
    assert keyed.post("/v1/searches", json=BODY, headers=other).status_code == 202


OTHER_SITES = (
    "https://evil.example", "//evil.example", "///evil.example", "/\\evil.example", "\\\\evil.example",
    "/\t/evil.example", "/%09/evil.example", "/\n/evil.example", "https:evil.example", "https:/evil.example",
    "javascript:alert(1)", "data:text/html,x", "/.//evil.example/..", "/..//evil.example", "//evil.example/%2f..",
    "@evil.example", ".evil.example", "http://testserver@evil.example", "\u2028//evil.example",
)  # fmt: skip


def test_no_login_leads_to_another_site(keyed: TestClient, make: Make) -> None:
    good = make("good")
    for wanted in OTHER_SITES:
        answer = keyed.post("/login", data={"key": good, "next": wanted})
        assert answer.status_code == 303
        assert at_home(answer.headers["location"])
        field = keyed.get("/login", params={"next": wanted}).text.partition('name="next" value="')[2].partition('"')[0]
        assert at_home(field)


def test_no_link_from_another_site_leads_to_a_third(keyed: TestClient) -> None:
    for path in ("//evil.example", "//evil.example/x", "/\\evil.example", "///evil.example", "//evil.example/%2e%2e"):
        sent = httpx.URL("http://testserver").copy_with(raw_path=path.encode())
        for site in ("cross-site", "none"):
            answer = keyed.get(str(sent), headers=PAGE | {"Sec-Fetch-Site": site})
            assert at_home(answer.headers.get("location", "/"))
            refresh = answer.text.partition("0; url=")[2].partition('"')[0]
            assert not refresh or at_home(refresh), refresh


def at_home(address: str) -> bool:
    """Whether a browser stays on this site when it follows `address` from a page of ours."""
    at = httpx.URL("http://testserver/login").join(address.replace("\\", "/").replace("\t", "").replace("\n", ""))
    return at.host == "testserver" and at.scheme == "http" and "://" not in address


FOREIGN_HOSTS = (
    "evil.example", "evil.example:8400", "127.0.0.1.nip.io", "localhost.", "0.0.0.0", "2130706433", "0x7f000001",
    "127.1", "[::ffff:10.0.0.1]", "testserver.evil.example", "testserver, evil.example", "localhost/healthz?",
    "localhost@evil.example",
)  # fmt: skip
FOREIGN_PAGES = (
    {"Origin": "null"}, {"Origin": "http://localhost:8400"}, {"Origin": "https://testserver.evil.example"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site", "Origin": "http://testserver"},
)  # fmt: skip


def test_pages_of_other_sites_reach_no_open_service(engine: Engine) -> None:
    search_id = examples.queued_search(engine)
    before = state(engine)
    with TestClient(create_app(engine, OPEN), raise_server_exceptions=False) as client:
        for host in FOREIGN_HOSTS:
            for path in ("/", "/v1/searches", f"/v1/searches/{search_id}/events", "/healthz", "/metrics"):
                assert client.get(path, headers={"Host": host}).status_code == 421, host
        for headers in FOREIGN_PAGES:
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json"):
                for path in ("/v1/searches", f"/v1/searches/{search_id}/cancel", f"/searches/{search_id}/cancel"):
                    answer = client.post(path, content=BODY_TEXT, headers=headers | {"Content-Type": kind})
                    assert answer.status_code == 403, (headers, kind)
                    assert "access-control-allow-origin" not in answer.headers
    assert state(engine) == before


def test_pages_of_other_sites_do_nothing_with_the_cookie(keyed: TestClient, engine: Engine, make: Make) -> None:
    search_id, admin = examples.queued_search(engine), cookie(make("admin", "admin"))
    for authorization in (None, "Bearer", "Bearer ", "bearer  ", "Basic x", "", "Bearer\t"):
        sent = admin | ({} if authorization is None else {"Authorization": authorization})
        for headers in FOREIGN_PAGES:
            for path in (f"/v1/searches/{search_id}/cancel", f"/searches/{search_id}/cancel"):
                assert keyed.post(path, headers=sent | headers).status_code == 403, (authorization, headers)
    assert keyed.get(f"/v1/searches/{search_id}", headers=admin).json()["state"] == "queued"
