"""What is fetched of the hub: not before it is known that there is room for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from search.errors import ModelTooLarge
from tests.aside import PATIENCE, aside
from workers import sources
from workers.sources import find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = "/{repo_id}/resolve/{revision}/{filename}"
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


class Hub:
    """As the hub answers of one model, whose weights it says are of any size."""

    def __init__(self) -> None:
        self.weights = len(FILES["model.safetensors"])
        self.fetched: list[str] = []

    def answer(self, path: str, command: str) -> tuple[bytes, dict[str, str]]:
        sizes = {name: len(content) for name, content in FILES.items()} | {"model.safetensors": self.weights}
        if "/tree/" in path:
            listing = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
            return json.dumps(listing).encode(), {}
        if path.startswith("/api/"):
            return json.dumps({"id": "org/model", "sha": COMMIT, "siblings": []}).encode(), {}
        name = path.rpartition("/")[2]
        if command == "GET":
            self.fetched.append(name)
        known = {"ETag": hashlib.sha256(FILES[name]).hexdigest(), "X-Repo-Commit": COMMIT}
        return FILES[name], known | {"Content-Length": str(sizes[name])}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, headers = hub.answer(self.path.partition("?")[0], self.command)
            self.send_response(200)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = aside(server.serve_forever, 0.05)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub
        server.shutdown()
        served.result(PATIENCE)


def test_a_model_that_there_is_room_for_is_fetched_once(hub: Hub) -> None:
    found = find_model("hub:org/model")
    assert {name: file.read_bytes() for name, file in found.all.items()} == FILES
    fetched = list(hub.fetched)
    assert set(fetched) == set(FILES)
    assert find_model("hub:org/model").all == found.all
    assert hub.fetched == fetched


@pytest.mark.parametrize(
    ("room", "says"),
    [
        (lambda patch: patch.setattr(sources, "_free_disk", lambda _folder: 10**13), "are free on this machine"),
        (lambda patch: patch.setattr("workers.memory.free_bytes", lambda _device: 10**15), "of the hub's cache, where"),
    ],
)
def test_nothing_is_fetched_of_one_that_fits_neither_the_memory_nor_the_disk(
    hub: Hub, room: Callable[[pytest.MonkeyPatch], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.weights = 5 * 10**12
    room(monkeypatch)
    with pytest.raises(ModelTooLarge, match=says) as refused:
        find_model("hub:org/model")
    assert refused.value.problem()["type"].endswith("model-too-large")
    assert hub.fetched == []
    assert not list(sources.models_roots()[-1].rglob("*.safetensors"))


def test_what_was_fetched_is_there_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_model("hub:org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.weights = 5 * 10**12
    assert find_model("hub:org/model").all == found.all
