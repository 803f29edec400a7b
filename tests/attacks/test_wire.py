"""What a client does to the connection itself: nothing of it is answered but with a refusal, and nobody else waits."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import Engine

from api import connection
from api.app import create_app
from tests.api import examples
from tests.api.conftest import KEYS, OPEN, serving
from tests.aside import PATIENCE
from tests.attacks.conftest import OURS, state
from tests.attacks.corpus import BODY, ESCAPES, GET, HEAD, NO_HTTP

BODY_SECONDS = HEAD_SECONDS = 1.0


@pytest.fixture(scope="module")
def attacked_url(emptied: Engine) -> Iterator[str]:
    """A real server, impatient, with one finished search."""
    examples.finished_search(emptied)
    settings = OPEN.model_copy(update={"body_seconds": BODY_SECONDS})
    with pytest.MonkeyPatch.context() as patch, serving(create_app(emptied, settings)) as url:
        patch.setattr(connection, "HEAD_SECONDS", HEAD_SECONDS)
        yield url


@pytest.fixture(autouse=True)
def _unharmed(attacked_url: str, emptied: Engine) -> Iterator[None]:
    before = state(emptied)
    yield
    assert httpx.get(f"{attacked_url}/v1/searches/1", timeout=PATIENCE).json()["state"] == "succeeded"
    assert state(emptied) == before


def connect(url: str) -> socket.socket:
    place = urlsplit(url)
    assert place.hostname is not None
    return socket.create_connection((place.hostname, place.port or 80), timeout=PATIENCE)


def send(url: str, *parts: bytes, pause: float = 0.0) -> bytes:
    """What is answered to `parts`, until the server closes the connection. Raises TimeoutError when it never does."""
    with connect(url) as line:
        answer, until = b"", time.monotonic() + PATIENCE
        for part in parts:
            try:
                line.sendall(part)
            except ConnectionError:
                break  # It was cut off in the middle of what it sent.
            time.sleep(pause)
        while time.monotonic() < until:
            try:
                received = line.recv(65536)
            except ConnectionError:
                return answer
            if not received:
                return answer
            answer += received
        raise TimeoutError(answer)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def answers(received: bytes) -> list[bytes]:
    """The answers, of which each begins where the one before ends."""
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        assert length is not None, received
        found.append(head + b"\r\n\r\n" + rest[: int(length[1])])
        received = rest[int(length[1]) :]
    return found


def refused(received: bytes) -> bool:
    """Whether it is problem documents, or nothing at all."""
    return all(map(_is_problem, answers(received)))


def _is_problem(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    problem = json.loads(body)
    told = any(words.encode() in answer for words in OURS)
    return b"application/problem+json" in head and 400 <= problem["status"] == status(answer) < 500 and not told


@pytest.mark.parametrize("case", NO_HTTP)
def test_what_is_no_http_is_refused_and_the_connection_closed(attacked_url: str, case: str) -> None:
    # What would be answered by another request, if it were taken for one.
    assert refused(send(attacked_url, NO_HTTP[case] + b"\r\n\r\n" + GET + b"\r\n"))


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n" + GET + b"\r\n"),
        (b"Content-Length: 2\r\n\r\n", BODY),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"2\r\n{}\r\n0\r\nHost: evil.example\r\n\r\n" + BODY),
    ],
)
def test_no_request_hides_in_the_body_of_another(attacked_url: str, head: bytes, body: bytes) -> None:
    answer = send(attacked_url, HEAD + head + body)
    assert answer
    assert refused(answer), answer


def test_slow_head_is_cut(attacked_url: str) -> None:
    answer = send(attacked_url, *[bytes([letter]) for letter in GET], pause=0.1)
    assert status(answer) == 408
    assert refused(answer)


def test_who_says_nothing_is_cut(attacked_url: str) -> None:
    assert refused(send(attacked_url))
    with connect(attacked_url) as line:
        line.sendall(GET + b"\r\n")
        assert line.recv(65536).startswith(b"HTTP/1.1 200")
        while line.recv(65536):
            pass  # Also after an answer.


@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
def test_slow_body_is_cut(attacked_url: str, length: bytes) -> None:
    answer = send(attacked_url, HEAD + length + b"\r\n\r\n", *[b"1\r\n \r\n"] * 20, pause=0.15)
    assert (status(answer), b"slow-body" in answer, b"connection: close" in answer.lower()) == (408, True, True)


def test_body_that_never_comes_is_waited_for_no_longer(attacked_url: str) -> None:
    assert status(send(attacked_url, HEAD + b"Content-Length: 100\r\n\r\n")) == 408
    assert (
        status(
            send(attacked_url, HEAD + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n").split(b"\r\n\r\n", 1)[1]
        )
        == 408
    )


def test_body_that_nobody_reads_is_not_taken_for_ever(emptied: Engine) -> None:
    with pytest.MonkeyPatch.context() as patch, serving(create_app(emptied, KEYS)) as url:
        patch.setattr(connection, "HEAD_SECONDS", HEAD_SECONDS)
        answer = send(url, HEAD + b"Content-Length: 100000\r\n\r\n", *[b" "] * 40, pause=0.1)
        assert status(answer) == 401


def test_garbage_after_an_answer_has_begun_ends_the_connection_only(attacked_url: str) -> None:
    for tail in (b"\xff" * 100, GET[:20], b"GET / HTTP/7\r\n\r\n"):
        with connect(attacked_url) as line:
            line.sendall(GET + b"\r\n" + tail)
            assert line.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("place", ["/v1/{}", "/v1/searches/{}", "/static/{}", "/searches/1/sensitivities/{}"])
def test_no_target_leads_to_a_file(attacked_url: str, place: str) -> None:
    """As it stands on the wire: no client has put it in order."""
    names = [name for name in ESCAPES if name.isascii() and name.isprintable() and " " not in name and name]
    for name in [
        *names,
        "../" * 9 + "etc/passwd",
        "..%2f" * 9 + "etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "%00",
        "%252e%252e",
    ]:
        answer = send(
            attacked_url, f"GET {place.format(name)} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert 400 <= status(answer) < 500, (name, answer[:200])
        assert b"root:" not in answer
        assert not any(words.encode() in answer for words in OURS)


@pytest.mark.parametrize(
    "target", [b"*", b"http://evil.example/v1/searches", b"evil.example:80", b"//evil.example/", b"/v1/searches#x"]
)
def test_other_forms_of_a_target_reach_nothing(attacked_url: str, target: bytes) -> None:
    for method in (b"GET", b"POST", b"CONNECT", b"OPTIONS"):
        answer = send(
            attacked_url, method + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        assert 400 <= status(answer) < 500, answer[:200]


@pytest.mark.parametrize(
    "inject", ["%0d%0aSet-Cookie:%20hacked=1", "%0d%0a%0d%0a<script>hacked</script>", "%e5%98%8a%e5%98%8dSet-Cookie:x"]
)
def test_no_answer_is_split(attacked_url: str, inject: str) -> None:
    for path in (
        f"/login?next=/{inject}",
        f"/{inject}",
        f"/v1/searches/{inject}",
        f"/searches/1?{inject}",
        f"/v1/searches?model={inject}",
    ):
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a{inject}\r\n"
        request += "Accept: text/html\r\nConnection: close\r\n\r\n"
        answer = send(attacked_url, request.encode())
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"\nset-cookie" not in head
        assert b"text/html" not in head or b"<script>hacked" not in answer
