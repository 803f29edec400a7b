"""What can go wrong with a request before or beside its answer, as problems a person can act on."""

from __future__ import annotations

from typing import Any

from search.errors import BitfrontierError


class HttpError(BitfrontierError):
    """A problem that is answered with headers of its own."""

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None, **about: Any) -> None:
        super().__init__(detail, **about)
        self.headers = headers or {}


class UnreadableBody(HttpError):
    """The body is not what can be read as JSON."""

    status = 400
    type = "unreadable-body"
    title = "The body cannot be read"


class SlowBody(HttpError):
    """The body did not arrive in time."""

    status = 408
    type = "slow-body"
    title = "The body took too long to arrive"


class BodyTooLarge(HttpError):
    """The body is larger than this service reads."""

    status = 413
    type = "body-too-large"
    title = "The body is too large"


class NotJson(HttpError):
    """The body is not sent as JSON."""

    status = 415
    type = "not-json"
    title = "The body is not sent as JSON"


class TookTooLong(HttpError):
    """The answer was not ready in time."""

    status = 503
    type = "took-too-long"
    title = "The answer took too long"


class TooManyStreams(HttpError):
    """As many event streams are open as this process holds."""

    status = 503
    type = "too-many-streams"
    title = "Too many event streams are open"
