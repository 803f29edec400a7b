"""Every error as an RFC 9457 problem document that names the field, its value and what is accepted."""

from __future__ import annotations

import json
import logging
import math
import uuid
from http import HTTPStatus
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from api.pages.render import problem_page
from db.errors import DatabaseUnavailable
from search.errors import BitfrontierError, InvalidRequest
from search.request import SearchRequest

logger = logging.getLogger(__name__)

LONGEST_VALUE = 500


class FieldError(BaseModel):
    """One of several errors of a request."""

    detail: str
    field: str | None = None
    value: Any = None
    accepted: Any = None


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:bitfrontier:problem:infeasible-budget",
                    "title": "No allocation fits the budget",
                    "status": 422,
                    "detail": "avg_bits = 3 is below what this space can reach; the smallest feasible value is 4.25",
                    "field": "budgets.avg_bits",
                    "value": 3,
                    "accepted": {"minimum": 4.25},
                }
            ]
        },
    )

    type: str
    """A URN that names the kind of problem."""
    title: str
    """The kind of problem in words; the same for every problem of a type."""
    status: int = Field(ge=400, le=599)
    """The HTTP status."""
    detail: str
    """What is wrong here, in words."""
    field: str | None = None
    """Path of the field that is wrong, for example `budgets.avg_bits`."""
    value: Any = None
    """The value that was not accepted."""
    accepted: Any = None
    """What is accepted instead."""
    errors: list[FieldError] | None = None
    """Each of several errors, when there is more than one."""
    request_id: str | None = None
    """Names this request in the service's log (internal errors only)."""


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem responses of a route, for its OpenAPI description; 422, 500 and 503 may always happen."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in sorted({*statuses, 422, 500, 503})
    }


def add_problem_handlers(app: FastAPI) -> None:
    """Answer every error of `app` with a problem document."""
    app.add_exception_handler(BitfrontierError, _bitfrontier_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OperationalError, _database_error)
    app.add_exception_handler(Exception, _internal_error)


def _answer(request: Request, problem: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """The problem as JSON; as a page for a browser that asks for a page."""
    problem = _plain(problem)
    on_page = not request.url.path.startswith("/v1/") and "text/html" in request.headers.get("accept", "")
    if on_page and request.method == "GET":
        return problem_page(request, problem, headers)
    return _ProblemResponse(problem, status_code=problem["status"], headers=headers)


class _ProblemResponse(JSONResponse):
    media_type = "application/problem+json"

    def render(self, content: Any) -> bytes:
        # ASCII escapes: a refused value may hold half of a surrogate pair, which UTF-8 cannot.
        return json.dumps(content, ensure_ascii=True, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    """`value` as strict JSON, cut where it is long: it may be anything that a client sent."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "…"


async def _bitfrontier_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BitfrontierError)
    headers = {"Retry-After": "5"} if error.status == DatabaseUnavailable.status else None
    return _answer(request, error.problem(), headers)


async def _database_error(request: Request, error: Exception) -> Response:
    logger.warning("%s %s: the database does not answer: %s", request.method, request.url.path, error)
    return await _bitfrontier_error(request, DatabaseUnavailable("the database does not answer; try again in a moment"))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    details = {
        400: "the body cannot be read: it must be JSON in UTF-8",
        404: f"nothing is at {path}",
        405: f"{request.method} is not allowed on {path}",
        413: "the body is larger than this service reads",
    }
    phrase = HTTPStatus(error.status_code).phrase
    problem: dict[str, Any] = {
        "type": f"urn:bitfrontier:problem:{phrase.lower().replace(' ', '-')}",
        "title": phrase,
        "status": error.status_code,
        "detail": details.get(error.status_code, str(error.detail)),
    }
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and error.headers:
        problem["accepted"] = sorted(error.headers.get("Allow", "").split(", "))
    return _answer(request, problem, dict(error.headers or {}))


async def _internal_error(request: Request, error: Exception) -> Response:
    request_id = uuid.uuid4().hex
    logger.error("request %s failed: %s %s", request_id, request.method, request.url.path, exc_info=error)
    problem = BitfrontierError(f"an unexpected error; the service's log has it under {request_id}").problem()
    return _answer(request, problem | {"request_id": request_id})


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # A list whose only item was refused is not also too short.
    paths = [item["loc"] for item in error.errors()]
    inner = [item for item in error.errors() if not any(_inside(path, item["loc"]) for path in paths)]
    found = [_field_error(item) for item in inner]
    if len(found) == 1:
        return _answer(request, _invalid(found[0]))
    detail = f"{len(found)} fields are not accepted: " + "; ".join(item["detail"] for item in found)
    return _answer(request, _invalid({"detail": detail}) | {"errors": found})


def _inside(path: tuple[Any, ...], outer: tuple[Any, ...]) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _invalid(found: dict[str, Any]) -> dict[str, Any]:
    return InvalidRequest(found["detail"]).problem() | found


def _field_error(error: dict[str, Any]) -> dict[str, Any]:
    """A pydantic error in our words: detail, field, value and accepted."""
    kind, (place, *path), context = error["type"], error["loc"], error.get("ctx", {})
    field = ".".join(str(part) for part in path if part != "[key]") or str(place)
    value, message = error.get("input"), str(error["msg"])
    if kind == "json_invalid":
        return {
            "detail": f"the body is not JSON: {context.get('error')} at character {path[0]}",
            "field": "body",
            "accepted": "a JSON object",
        }
    if place == "body" and isinstance(value, bytes):
        return {
            "detail": "the body is not sent as JSON",
            "field": "body",
            "accepted": "a JSON object with the header Content-Type: application/json",
        }
    if kind == "missing":
        found = {"detail": f"{field} is required", "field": field}
        return found | _accepted(_description(path) if place == "body" else None)
    if kind == "extra_forbidden":
        names = _names(path[:-1])
        detail = f"{field} is not a field; accepted: {', '.join(names)}"
        return {"detail": detail, "field": field, "value": value, "accepted": names}
    if kind == "value_error":
        return {"detail": f"{field}: {message.removeprefix('Value error, ')}", "field": field, "value": value}
    if " should have " in message:
        # Pydantic begins with the name of a Python type.
        accepted = message.partition(" should have ")[2].replace(" after validation", "")
        return {"detail": f"{field} should have {accepted}", "field": field, "value": value, "accepted": accepted}
    accepted = message.removeprefix("Input should be ").removeprefix("Input should ")
    if kind == "string_pattern_mismatch":
        accepted = _as_phrase(_description(path)) or accepted
    return {"detail": f"{field} should be {accepted}", "field": field, "value": value, "accepted": accepted}


def _accepted(text: str | None) -> dict[str, str]:
    return {"accepted": text} if text else {}


def _names(path: list[Any]) -> list[str]:
    """The fields accepted in the search request at `path`."""
    model: type[BaseModel] = SearchRequest
    for part in path:
        # What is no field is a name, of a limit.
        if part in model.model_fields:
            model = _document(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _document(annotation: Any) -> Any:
    """The document that a field holds, perhaps by name, or may hold."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _as_phrase(text: str | None) -> str | None:
    """A description's first sentence, to stand inside one."""
    if not text:
        return None
    sentence = text.split(". ")[0].rstrip(".")
    return sentence[0].lower() + sentence[1:]


def _description(path: list[Any]) -> str | None:
    """What the search request's field at `path` says of itself."""
    model: Any = SearchRequest
    description = None
    for part in path:
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return None
        description, model = fields[part].description, _document(fields[part].annotation)
    return description
