"""Requests are taken by the letter: JSON as its standard has it, and no query parameter that a route does not know."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from api.errors import NotJson, UnreadableBody
from search.errors import InvalidRequest

_WHOLE = re.compile(r"0|-?[1-9][0-9]*")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _plain(value: object) -> object:
    if isinstance(value, str) and not _WHOLE.fullmatch(value):
        raise PydanticCustomError("int_parsing", "Input should be a valid integer")
    return value


PLAIN = BeforeValidator(_plain)
"""Makes an integer of a path, a query or a header be written the one way: not `1.0`, `+1`, `01` or ` 1`."""


class StrictRoute(APIRoute):
    """A route that refuses a query parameter it does not know or is given twice, and what JSON readers disagree on."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request, behind these checks."""
        answer = super().get_route_handler()
        fields = get_flat_params(self.dependant)
        known = [field.alias for field in fields if isinstance(field.field_info, params.Query)]
        takes_body = self.body_field is not None

        async def strictly(request: Request) -> Response:
            _check_query(request, known)
            return await answer(await _read(request) if takes_body else request)

        return strictly


class _ReadRequest(Request):
    """A request whose body was read as JSON before."""

    document: Any = None

    async def json(self) -> Any:
        return self.document


def _check_query(request: Request, known: list[str]) -> None:
    given = Counter(name for name, _ in request.query_params.multi_items())
    for name, times in given.items():
        if name not in known:
            raise InvalidRequest(
                f"'{name}' is not a query parameter; accepted: {', '.join(known) or 'none'}",
                field=name,
                value=request.query_params[name],
                accepted=known,
            )
        if times > 1:
            raise InvalidRequest(f"{name} is given {times} times", field=name, accepted="one value")


async def _read(request: Request) -> _ReadRequest:
    read = _ReadRequest(request.scope, request.receive)
    body = await read.body()
    if body:
        _check_content_type(request.headers.get("content-type", ""))
        _check_coding(request.headers.get("content-encoding", "identity"))
        read.document = parse_json(body)
    return read


def _check_content_type(given: str) -> None:
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise NotJson(
            f"the body is sent as {kind or 'nothing in particular'}, and read as JSON",
            field="Content-Type",
            value=given,
            accepted="application/json",
        )


def _check_coding(given: str) -> None:
    if given.strip().lower() != "identity":
        raise NotJson(
            f"the body is sent in the coding {given}, and read as it is",
            field="Content-Encoding",
            value=given,
            accepted="identity",
            headers={"Accept-Encoding": "identity"},
        )


def parse_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8. NaN and infinities pass: whatever takes a number refuses them by name.

    Raises UnreadableBody when it is not UTF-8; InvalidRequest when it is not JSON, when an object names a field twice,
    when it is nested too deeply, for integers of thousands of digits and for half a surrogate pair, which no UTF-8 has.
    """
    accepted = "a JSON object"
    try:
        document = json.loads(body.decode(), object_pairs_hook=_object)
        if _ESCAPED_SURROGATE.search(body):
            json.dumps(document, ensure_ascii=False).encode()
        return document
    except UnicodeEncodeError as error:
        raise InvalidRequest("a text has half of a surrogate pair", field="body", accepted=accepted) from error
    except UnicodeDecodeError as error:
        detail = f"the body is not UTF-8: its byte {error.start} cannot be decoded"
        raise UnreadableBody(detail, field="body", accepted="JSON in UTF-8") from error
    except json.JSONDecodeError as error:
        detail = f"the body is not JSON: {error.msg} at character {error.pos}"
        raise InvalidRequest(detail, field="body", accepted=accepted) from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply", field="body", accepted=accepted) from error
    except ValueError as error:
        raise InvalidRequest("the body has an integer of too many digits", field="body", accepted=accepted) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise InvalidRequest(f"an object names '{twice}' twice", field=twice, accepted="each field once")
    return found
