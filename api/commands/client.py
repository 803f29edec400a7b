"""The service over HTTP, as the command line uses it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from api.commands.console import Refused
from api.documents import FINISHED

# Keep-alive comments come every 15 s; a stream that is silent for longer is dead.
SILENCE_SECONDS = 40.0
RECONNECT_SECONDS = 1.0
MOST_RECONNECTS = 30


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a search's stream."""

    id: str
    kind: str
    data: dict[str, Any]


class Client:
    """Talks to the service at `url`. Raises Refused for problems, httpx.HTTPError where nothing answers."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=60.0, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, **params: str) -> httpx.Response:
        """GET, or the problem raised."""
        return _answered(self._http.get(path, params=params))

    def post(self, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> Any:
        """POST; the answer's document, or the problem raised."""
        return _answered(self._http.post(path, json=body, headers=headers)).json()

    def follow(self, search_id: int, check: Callable[[], None]) -> Iterator[Event]:
        """The events of a search from the first to the final one; resumes where a connection broke.

        `check` is called at every sign of life, at least as often as keep-alive comments come; it may raise.
        """
        last, failures = "0", 0
        while True:
            try:
                for event in self._stream(search_id, last, check):
                    last, failures = event.id, 0
                    yield event
                    if event.kind == "state" and event.data["state"] in FINISHED:
                        return
            except httpx.TransportError:
                failures += 1
                check()
                if failures > MOST_RECONNECTS:
                    raise
            time.sleep(RECONNECT_SECONDS)

    def _stream(self, search_id: int, last: str, check: Callable[[], None]) -> Iterator[Event]:
        path, timeout = f"/v1/searches/{search_id}/events", httpx.Timeout(10.0, read=SILENCE_SECONDS)
        with self._http.stream("GET", path, headers={"Last-Event-ID": last}, timeout=timeout) as response:
            if response.is_error:
                response.read()
            _answered(response)
            fields: dict[str, str] = {}
            for line in response.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                    continue
                check()
                if "data" in fields:
                    yield Event(fields.get("id", last), fields.get("event", "message"), json.loads(fields["data"]))
                    fields = {}


def _answered(response: httpx.Response) -> httpx.Response:
    if not response.is_error:
        return response
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        raise Refused(response.json())
    detail = f"{response.request.url} answered {response.status_code}; is this a Bitfrontier service?"
    raise Refused({"title": "Unexpected answer", "detail": detail})
