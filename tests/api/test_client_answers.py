"""What the Python client makes of answers that no service of ours gives, and of addresses that it is given."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from api.client import Client, ClientError, NotUnderstood, Unreachable
from api.client_errors import NotAnAddress
from api.commands.service import free_port
from tests.aside import PATIENCE


@contextmanager
def answering(body: bytes, **headers: str) -> Iterator[str]:
    """The address of something that answers everything with `body`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join(PATIENCE)


@pytest.mark.parametrize(
    "event",
    [
        "id: 1\nevent: state\ndata: {nope",
        "event: state\ndata: {}",
        "id: 1\nevent: new\ndata: 5",
        "id: one\nevent: state\ndata: {}",
        "id: 1\nevent: state\ndata: {}",
        f"id: 1\nevent: new\ndata: {'[' * 60_000}",
    ],
)
def test_an_event_that_cannot_be_read_is_said_at_once(event: str) -> None:
    stream = answering(f"{event}\n\n".encode(), content_type="text/event-stream")
    wanted = pytest.raises(NotUnderstood, match="an event of search 1 that cannot be read")
    with stream as url, Client(url) as client, wanted:
        list(client.events(1, timeout=PATIENCE))


def test_what_cannot_be_decoded_is_said_at_once() -> None:
    with answering(b"garbage", content_encoding="gzip") as url, Client(url) as client:
        for ask in (lambda: client.search(1), lambda: list(client.events(1, timeout=PATIENCE))):
            with pytest.raises(NotUnderstood, match=f"{url} sent what cannot be decoded"):
                ask()


@pytest.mark.parametrize("offered", [".bashrc", "..", "a/b", "a\\b", "", "a b"])
def test_a_file_has_a_plain_name_whatever_is_offered(offered: str, tmp_path: Path) -> None:
    with answering(b"x", content_disposition=f'attachment; filename="{offered}"') as url, Client(url) as client:
        file = client.export(1, 1)
    assert file.save(tmp_path) == tmp_path / "config.json"
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(IsADirectoryError):
        file.save(tmp_path)


def test_a_password_in_an_address_is_not_repeated() -> None:
    def told(url: str) -> ClientError:
        with pytest.raises(ClientError) as error, Client(url, retries=0) as client:
            client.models()
        return error.value

    port = free_port()
    away = told(f"http://ada:secret@127.0.0.1:{port}")
    assert isinstance(away, Unreachable)
    assert f"no answer from http://127.0.0.1:{port}" in str(away)
    with answering(b"<h1>hello</h1>") as url:
        strange = told(url.replace("//", "//ada:secret@"))
    wrong = [told(url) for url in ("ftp://ada:secret@host", "ada:secret@host", "http://ada:secret@ho st:x")]
    assert {type(error) for error in wrong} == {NotAnAddress}
    assert not [error for error in (away, strange, *wrong) if "secret" in error.problem.model_dump_json()]


def test_less_than_no_retries_are_refused() -> None:
    with pytest.raises(ValueError, match="retries = -1"):
        Client(retries=-1)
