"""What surrounds every answer: security headers, entity tags, limits on size and time."""

from __future__ import annotations

import asyncio
import socket

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.app import create_app
from tests.api import examples
from tests.api.conftest import OPEN, serving
from tests.aside import PATIENCE

PATHS = ("/", "/searches/1", "/v1/searches", "/v1/searches/1", "/healthz", "/metrics", "/static/chart.js", "/nothing")


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_tells_browsers_to_do_little(client: TestClient, engine: Engine, path: str) -> None:
    examples.queued_search(engine)
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin", "else a form of ours would come from nowhere"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-request-id"]
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in policy.get("script-src", "")
    assert "public" not in headers["cache-control"] or path.startswith("/static/")


def test_what_is_private_is_kept_by_nobody_else(client: TestClient, engine: Engine) -> None:
    examples.queued_search(engine)
    assert client.get("/v1/searches/1").headers["cache-control"] == "private, no-cache"
    assert client.get("/searches/1").headers["cache-control"] == "private, no-cache"
    for answer in (client.post("/v1/searches/1/cancel"), client.get("/v1/searches/2"), client.get("/readyz")):
        assert answer.headers["cache-control"] == "no-store"


GETS = (
    "/v1/searches",
    "/v1/searches/1",
    "/v1/searches/1/frontier",
    "/v1/searches/1/frontier?format=csv",
    "/v1/searches/1/sensitivities",
    "/v1/searches/1/points/5",
    "/v1/searches/1/points/5/config",
    "/v1/models",
    "/v1/schemes",
    "/v1/metrics",
    "/v1/targets",
    "/v1/latency-profiles",
)


def test_a_client_that_has_the_answer_is_not_sent_it_again(client: TestClient, engine: Engine) -> None:
    examples.finished_search(engine)
    for path in GETS:
        first = client.get(path)
        tag = first.headers["etag"]
        assert first.status_code == 200
        assert tag.startswith('W/"')
        for known in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
            again = client.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag), (path, known)
            assert again.headers["cache-control"] == "private, no-cache"
            assert "content-type" not in again.headers
        assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content
        assert client.get(path, headers={"Accept-Encoding": "identity"}).headers["etag"] == tag


def test_the_tag_changes_with_the_search(client: TestClient, engine: Engine) -> None:
    search_id = examples.queued_search(engine)
    tag = client.get(f"/v1/searches/{search_id}").headers["etag"]
    client.post(f"/v1/searches/{search_id}/cancel")
    assert client.get(f"/v1/searches/{search_id}", headers={"If-None-Match": tag}).status_code == 200


def test_a_stream_has_no_tag(client: TestClient, engine: Engine) -> None:
    answer = client.get(f"/v1/searches/{examples.finished_search(engine)}/events", headers={"If-None-Match": "*"})
    assert (answer.status_code, "etag" in answer.headers) == (200, False)


def test_a_body_that_trickles_in_is_given_up(engine: Engine) -> None:
    """The header promises a body; its bytes come one by one, each soon enough after the last."""
    app, pause, sent = create_app(engine, OPEN.model_copy(update={"body_seconds": 0.5})), 0.1, 0
    with serving(app) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(
            b"POST /v1/searches HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100000\r\n\r\n"
        )
        connection.settimeout(pause)
        answer = b""
        while not answer and sent < PATIENCE / pause:
            connection.sendall(b" ")
            sent += 1
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"application/problem+json" in answer
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_not_read_to_its_end(client: TestClient, chunked: bool) -> None:
    body = [b" " * 600_000] * 2
    answer = client.post(
        "/v1/searches",
        content=iter(body) if chunked else b"".join(body),
        headers={"Content-Type": "application/json"},
    )
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
    assert answer.json()["accepted"] == "at most 1,000,000 bytes"
    assert answer.headers["connection"] == "close"


def test_an_answer_that_takes_too_long_is_a_problem(engine: Engine) -> None:
    app = create_app(engine, OPEN.model_copy(update={"answer_seconds": 0.1}))

    async def slow() -> None:
        await asyncio.Event().wait()

    app.get("/v1/slow")(slow)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/v1/slow")
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:bitfrontier:problem:took-too-long")
        assert int(answer.headers["retry-after"]) > 0
