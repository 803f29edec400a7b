"""Logging in with a key, for people: the browser keeps it in a cookie that no script can read."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response

from api.auth import asking
from api.errors import HttpError
from api.keyring import COOKIE, Keyring
from api.origins import place_of
from api.pages.render import page
from api.refusals import TooManyRequests, Unauthenticated

router = APIRouter(include_in_schema=False)

COOKIE_SECONDS = 30 * 24 * 3600
MOST_FIELDS = 10
# Browsers take "//" and "/\" for the beginning of another site's address, and leave out control characters.
_LOCAL = re.compile(r"/(?![/\\])[^\x00-\x20\x7f\\]*")

Next = Annotated[str, Query(max_length=2000)]


@router.get("/login")
def login_form(request: Request, next: Next = "/") -> Response:
    """The form that takes a key; without a question where none is asked for."""
    if asking.get() is not None:
        return _to(next)
    return page("login.html", next=_local(next), linked=next != "/" and _may_be_linked(request), problem=None)


@router.post("/login")
async def log_in(request: Request) -> Response:
    """Take a key from the form, and go on to where the browser came from."""
    fields = await _fields(request)
    next = fields.get("next", "/")
    keyring: Keyring = request.app.state.keyring
    token = fields.get("key", "").strip()
    try:
        await keyring.identify(request, token)
    except (Unauthenticated, TooManyRequests) as error:
        return _form(next, error)
    answer = _to(next)
    answer.set_cookie(
        COOKIE,
        token,
        max_age=COOKIE_SECONDS,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return answer


@router.post("/logout")
def log_out() -> Response:
    """Forget the key."""
    answer = _to("/login")
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer


def _may_be_linked(request: Request) -> bool:
    """Whether another site may have led here. Then a browser has kept its cookie, and we cannot tell that it has one.

    A browser that names the site says so at the gate; over plain HTTP none does, and may not name the page either.
    """
    came_from = request.headers.get("referer")
    ours = came_from is not None and place_of(came_from) == request.headers.get("host", "").lower()
    return "sec-fetch-site" not in request.headers and not ours


def _form(next: str, error: HttpError) -> Response:
    return page(
        "login.html", status=error.status, headers=error.headers, next=_local(next), linked=False, problem=error.detail
    )


async def _fields(request: Request) -> dict[str, str]:
    """The fields of a form; none when it has more than a form of ours."""
    try:
        found = parse_qs((await request.body()).decode(errors="replace"), max_num_fields=MOST_FIELDS)
    except ValueError:
        return {}
    return {name: values[0] for name, values in found.items()}


def _to(path: str) -> RedirectResponse:
    return RedirectResponse(_local(path), status_code=303)


def _local(path: str) -> str:
    """A path of this service; where it would lead to another site, the first page."""
    return path if _LOCAL.fullmatch(path) else "/"
