"""Requests to the service and what comes back: documents, files, or an error that says what is wrong."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from api.client_errors import NotAKey, NotAnAddress, NotUnderstood, Refused, Unreachable
from api.documents import Problem

DEFAULT_URL = "http://127.0.0.1:8400"
URL_VARIABLE = "BITFRONTIER_URL"
KEY_VARIABLE = "BITFRONTIER_KEY"

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0
BUSY = (429, 502, 503, 504)
"""Answers after which the same may be asked again."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""What the service calls its files. Another name could reach another folder, or hide."""

Document = TypeVar("Document", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class File:
    """What the service offers for download."""

    name: str
    content: bytes

    @property
    def text(self) -> str:
        """The content of a text file."""
        return self.content.decode()

    def save(self, path: Path | str) -> Path:
        """Write it to `path`, or under its own name where `path` is a folder; the path written."""
        target = Path(path) / self.name if Path(path).is_dir() else Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.content)
        return target


class Transport:
    """Requests to the service at `url`, with `key` where there is one; see `api.client.Client`.

    All of them may be sent twice. Raises Refused for problems, Unreachable where no service answers, NotUnderstood for
    what cannot be read.
    """

    def __init__(self, url: str | None, key: str | None, *, timeout: float, retries: int) -> None:
        if retries < 0:
            raise ValueError(f"retries = {retries}: accepted is 0 or more")
        address = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
        self.url = _shown(address)
        self._key_from = KEY_VARIABLE if key is None else "the argument 'key'"
        self._retries = retries
        headers = _authorization(os.environ.get(KEY_VARIABLE, "") if key is None else key, self._key_from)
        self._http = httpx.Client(base_url=_address(address), timeout=timeout, trust_env=False, headers=headers)

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    def read(self, kind: type[Document], method: str, path: str, **about: Any) -> Document:
        """The document that a request is answered with."""
        response = self.send(method, path, **about)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise self._strange(response, "something else than was asked for") from error

    def download(self, path: str, params: Mapping[str, str], name: str) -> File:
        """The file at `path`, under the name it is offered under, else `name`."""
        response = self.send("GET", path, params=params)
        _, _, offered = response.headers.get("content-disposition", "").partition('filename="')
        offered = offered.partition('"')[0]
        return File(offered if PLAIN_NAME.fullmatch(offered) else name, response.content)

    def send(self, method: str, path: str, **about: Any) -> httpx.Response:
        """The answer to a request, sent again where there was none or the service was busy."""
        for attempt in range(self._retries + 1):
            last, pause = attempt == self._retries, FIRST_PAUSE_SECONDS * 3**attempt
            try:
                response = self._http.request(method, path, **about)
            except httpx.DecodingError as error:
                raise self._garbled(error) from error
            except httpx.RequestError as error:
                if last:
                    raise self.unreachable(error) from error
            else:
                if last or response.status_code not in BUSY:
                    break
                pause = max(pause, _asked_pause(response))
            time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        return self._checked(response)

    def lines(self, path: str, headers: Mapping[str, str], silence: float) -> Iterator[str]:
        """The lines of a stream as they come; raises httpx.RequestError once it breaks, or is silent for so many
        seconds."""
        timeout = httpx.Timeout(10.0, read=silence)
        try:
            with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                yield from self._checked(response).iter_lines()
        except httpx.DecodingError as error:
            raise self._garbled(error) from error

    def unreachable(self, error: httpx.RequestError) -> Unreachable:
        """What to say where nothing answers."""
        return Unreachable(f"no answer from {self.url} ({str(error) or type(error).__name__})")

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        if not response.headers.get("content-type", "").startswith("application/problem+json"):
            raise self._strange(response, str(response.status_code))
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError as error:
            raise self._strange(response, str(response.status_code)) from error
        if response.status_code == httpx.codes.UNAUTHORIZED:
            problem = problem.model_copy(update={"detail": self._about_keys(response)})
        raise Refused(problem)

    def _about_keys(self, response: httpx.Response) -> str:
        if "Authorization" in response.request.headers:
            return f"the key in {self._key_from} is not known here, was revoked or has expired"
        return f"this service asks for a key: set {KEY_VARIABLE} (bitfrontier keys create NAME)"

    def _strange(self, response: httpx.Response, answer: str) -> Unreachable:
        url = response.request.url.copy_with(userinfo=b"")
        return Unreachable(f"{url} answered {answer}; is this a Bitfrontier service of this version?")

    def _garbled(self, error: httpx.DecodingError) -> NotUnderstood:
        return NotUnderstood(f"{self.url} sent what cannot be decoded: {error}")


def _shown(url: str) -> str:
    """An address without a user and a password."""
    return re.sub(r"^([a-z]+://)?.*@", r"\1", url, flags=re.IGNORECASE | re.DOTALL)


def _address(url: str) -> httpx.URL:
    with contextlib.suppress(httpx.InvalidURL):
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host:
            return parsed
    shown = _shown(url)
    raise NotAnAddress(f"'{shown}' is not the address of a service", value=shown, accepted="http://HOST:PORT")


def _authorization(key: str, given_by: str) -> dict[str, str]:
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise NotAKey(f"what {given_by} holds is not a key")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _asked_pause(response: httpx.Response) -> float:
    """The seconds after which the service wants to be asked again."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0
