"""Every error as an RFC 9457 problem document that names the field, its value and what is accepted."""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from starlette.exceptions import HTTPException
from starlette.routing import Match

from api.errors import HttpError
from api.pages.render import problem_page, wants_page
from api.validation import invalid
from db import logs
from db.errors import DatabaseUnavailable
from search.errors import BitfrontierError, InvalidRequest

logger = logging.getLogger(__name__)

# Of what a client sent, and is told was wrong.
LONGEST_TEXT = 500
LONGEST_LIST = 200
DEEPEST = 6

RETRY_SECONDS = 5
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
ALWAYS = (401, 403, 421, 422, 429, 500, 503)
"""Statuses that any request may be answered with."""
BODY = (400, 408, 413, 415)
"""Statuses that a request with a body may be answered with besides."""
READ = (304,)
"""Statuses that a GET under /v1 may be answered with besides."""
AWAY = (OperationalError, InterfaceError, PoolExhausted)
"""What is raised when the database does not answer."""


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route besides its own, for its OpenAPI description: `statuses`, and those that may always be."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": HTTPStatus(status).phrase} | ({"content": content} if status >= 400 else {})
        for status in sorted({*statuses, *ALWAYS})
    }


def add_problem_handlers(app: FastAPI) -> None:
    """Answer the errors that FastAPI has answers of its own for with problem documents.

    The others pass on to `api.middleware.problems`, and with them what other middleware raises.
    """
    app.add_exception_handler(RequestValidationError, _handled)
    app.add_exception_handler(HTTPException, _handled)


async def _handled(request: Request, error: Exception) -> Response:
    return problem_response(request, error)


def problem_response(request: Request, error: Exception) -> Response:
    """The answer to `error`: JSON, or a page for a browser that asks for a page. What nobody foresaw is logged."""
    problem, headers = problem_of(request, error)
    if problem["status"] in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS):
        headers = {"Retry-After": str(RETRY_SECONDS)} | headers
    if identifier := logs.request_id.get():
        problem["request_id"] = identifier
    problem = _plain(problem)
    if wants_page(request):
        return problem_page(request, problem, headers)
    return _ProblemResponse(problem, status_code=problem["status"], headers=headers)


def problem_of(request: Request, error: Exception) -> tuple[dict[str, Any], dict[str, str]]:
    """The problem document of an error, and the headers that go with it."""
    if isinstance(error, AWAY):
        # Not the whole error: it would repeat the statement with its parameters.
        logger.warning("the database does not answer: %s", str(getattr(error, "orig", None) or error).strip())
        error = DatabaseUnavailable("the database does not answer; try again in a moment")
    if isinstance(error, BitfrontierError):
        return error.problem(), error.headers if isinstance(error, HttpError) else {}
    if isinstance(error, RequestValidationError):
        found = invalid(error.errors())
        return InvalidRequest(found["detail"]).problem() | found, {}
    if isinstance(error, HTTPException):
        problem, headers = _http_problem(request, error), dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # FastAPI's own Allow has the methods of one route only, and a path may have several.
            problem["accepted"] = _allowed(request)
            headers["Allow"] = ", ".join(problem["accepted"])
        return problem, headers
    logger.error("%s %s failed", request.method, _path(request), exc_info=error)
    detail = f"an unexpected error; the service's log has it under {logs.request_id.get()}"
    return BitfrontierError(detail).problem(), {}


class _ProblemResponse(JSONResponse):
    media_type = "application/problem+json"

    def render(self, content: Any) -> bytes:
        # ASCII escapes: a refused value may hold half of a surrogate pair, which UTF-8 cannot.
        return json.dumps(content, ensure_ascii=True, allow_nan=False).encode()


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` as strict JSON, cut where it is long or deep: it may be anything that a client sent."""
    if isinstance(value, dict | list | tuple) and depth == DEEPEST:
        return "…"
    if isinstance(value, dict):
        return {_cut(str(key)): _plain(item, depth + 1) for key, item in list(value.items())[:LONGEST_LIST]}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value[:LONGEST_LIST]]
    if value is None or isinstance(value, bool) or (isinstance(value, int | float) and _is_exact(value)):
        return value
    return _cut(value.decode(errors="replace") if isinstance(value, bytes) else str(value))


def _is_exact(number: float) -> bool:
    """Whether every JSON reader takes a number for what it is."""
    return abs(number) < 2**63 if isinstance(number, int) else math.isfinite(number)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def _path(request: Request) -> str:
    """The path as it was sent: percent escapes keep control characters out of logs and answers."""
    raw: bytes = request.scope.get("raw_path") or request.url.path.encode()
    return raw.partition(b"?")[0].decode("ascii", errors="replace")


def _http_problem(request: Request, error: HTTPException) -> dict[str, Any]:
    """The problem of an error that Starlette or FastAPI raised."""
    details = {
        400: "the body cannot be read",
        404: f"nothing is at {_path(request)}",
        405: f"{request.method} is not allowed on {_path(request)}",
    }
    phrase = HTTPStatus(error.status_code).phrase
    return {
        "type": f"urn:bitfrontier:problem:{phrase.lower().replace(' ', '-')}",
        "title": phrase,
        "status": error.status_code,
        "detail": details.get(error.status_code, str(error.detail)),
    }


def _allowed(request: Request) -> list[str]:
    """The methods that something answers to at the path of `request`."""
    return [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]
