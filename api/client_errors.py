"""What a client raises. Each has the problem document that says what is wrong."""

from __future__ import annotations

from typing import Any, ClassVar

from api.documents import Problem, SearchDocument


class ClientError(Exception):
    """Base of what a client raises; `problem` says in words what is wrong and, where known, of which field."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class Refused(ClientError):
    """The service answered with a problem."""


class _Local(ClientError):
    """A problem that the service has not answered with."""

    type: ClassVar[str]
    title: ClassVar[str]
    status: ClassVar[int]

    def __init__(self, detail: str, **about: Any) -> None:
        named = {"type": f"urn:bitfrontier:problem:{self.type}", "title": self.title, "status": self.status}
        super().__init__(Problem(detail=detail, **named, **about))


class Unreachable(_Local):
    """Nothing answers, or something that is no Bitfrontier service."""

    type = "unreachable"
    title = "The service cannot be reached"
    status = 503


class NotUnderstood(_Local):
    """What answers sent something that this client cannot read."""

    type = "not-understood"
    title = "The answer cannot be read"
    status = 502


class NotAnAddress(_Local):
    """What was given as the address of the service is none."""

    type = "not-an-address"
    title = "This is no address of a service"
    status = 422


class NotAKey(_Local):
    """What was given as a key cannot be sent."""

    type = "not-a-key"
    title = "The key cannot be sent"
    status = 401


class NotFinished(_Local, TimeoutError):
    """The search is still queued or running."""

    type = "not-finished"
    title = "The search is not finished"
    status = 409


class SearchFailed(ClientError):
    """The search has failed; `problem` is the reason."""

    def __init__(self, search: SearchDocument) -> None:
        unknown = Problem(type="about:blank", title="The search failed", status=500, detail="no reason is known")
        super().__init__(search.error or unknown)
        self.search = search


class SearchCancelled(_Local):
    """The search was cancelled."""

    type = "cancelled"
    title = "Cancelled"
    status = 409

    def __init__(self, search: SearchDocument) -> None:
        super().__init__(f"search {search.id} was cancelled")
        self.search = search
