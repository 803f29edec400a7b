"""Why a request is turned away before anything is done for it."""

from __future__ import annotations

from api.errors import HttpError


class Unauthenticated(HttpError):
    """No key came with the request, or one that opens nothing."""

    status = 401
    type = "unauthenticated"
    title = "This service asks for a key"


class Forbidden(HttpError):
    """The key's scope does not cover the request."""

    status = 403
    type = "forbidden"
    title = "The key may not do this"


class CrossSite(HttpError):
    """A page of another site sent the request."""

    status = 403
    type = "cross-site"
    title = "The request comes from a page of another site"


class MisdirectedRequest(HttpError):
    """The Host header names another machine."""

    status = 421
    type = "misdirected-request"
    title = "This service is open on its own machine only"


class TooManyRequests(HttpError):
    """More requests in a minute than are granted."""

    status = 429
    type = "too-many-requests"
    title = "Too many requests"
