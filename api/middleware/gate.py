"""The gate before every route: who asks, whether they may, and how often."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal
from urllib.parse import quote, urlencode

from fastapi import Request
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import ANYONE, Asker, asking
from api.keyring import Keyring, bearer_token, token_of
from api.origins import SAFE_METHODS, check_host, check_same_origin
from api.pages.render import page, wants_page
from api.refusals import Forbidden, Unauthenticated
from db import grants

Access = Literal["keys", "open"]

METRICS = "/metrics"

_PUBLIC = re.compile(r"/healthz|/readyz|/login|/logout|/static/[^/]+")


def is_public(path: str) -> bool:
    """Whether whatever is at `path` is answered without a key."""
    return _PUBLIC.fullmatch(path) is not None


class Gate:
    """Lets a request through to `app` when whoever sent it may, and says so in `asking`; raises a problem otherwise.

    What is not public needs a key, a route that is added later too. `open` asks nobody for a key, but answers only to
    the names of this machine and to `hosts`.
    """

    def __init__(self, app: ASGIApp, access: Access, hosts: Collection[str]) -> None:
        self.app = app
        self.access = access
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        assert scope["type"] in ("http", "lifespan"), "there is no way through for anything else"
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            asker, headers = await self._admit(request)
        except Unauthenticated:
            if not wants_page(request):
                raise
            await _to_login(request)(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        before = asking.set(asker)
        try:
            await self.app(scope, receive, sending)
        finally:
            asking.reset(before)

    async def _admit(self, request: Request) -> tuple[Asker | None, dict[str, str]]:
        """Who asks (None: nobody needs to say), and headers for the answer."""
        if self.access == "open":
            check_host(request, self.hosts)
        # An empty token is none: what then lets the request in is the cookie, which a browser sends for any page.
        if not bearer_token(request):
            check_same_origin(request)
        if self.access == "open":
            return ANYONE, {}
        if is_public(request.scope["path"]):
            return None, {}
        token = token_of(request)
        if not token:
            raise Unauthenticated(
                "no key came with the request",
                headers={"WWW-Authenticate": "Bearer"},
                accepted="Authorization: Bearer bf_…, with a key that 'bitfrontier keys create' made",
            )
        keyring: Keyring = request.app.state.keyring
        identify = keyring.identify_scraper if request.scope["path"] == METRICS else keyring.identify
        key = await identify(request, token)
        headers = await keyring.rates.spend(key)
        asker = Asker(key)
        needed: grants.Scope = "read" if request.method in SAFE_METHODS else "write"
        if not asker.may(needed):
            raise Forbidden(
                f"{request.method} needs a key with the scope {needed}",
                headers=headers | {"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{needed}"'},
                accepted=needed,
            )
        return asker, headers


async def still_admitted(request: Request) -> bool:
    """Whether who began `request` would still be let in; what lasts long asks now and then."""
    asker = asking.get()
    if asker is None or asker.key is None:
        return asker is not None
    keyring: Keyring = request.app.state.keyring
    return await keyring.still_holds(request)


def _to_login(request: Request) -> Response:
    """The way to the login form, and back from there to what was asked for."""
    query = request.scope["query_string"].decode("latin-1")
    # What begins with two slashes would lead to another site.
    wanted = "/" + quote(request.scope["path"].lstrip("/")) + (f"?{query}" if query else "")
    if "hx-request" in request.headers:
        # A page asks for a part of itself: it is to ask for all of itself, and be led from there.
        return Response(headers={"HX-Refresh": "true"})
    if request.headers.get("sec-fetch-site") == "cross-site":
        # A browser keeps its cookie from a link on another site; asked again by a page of ours, it sends it.
        return page("again.html", wanted=wanted)
    return RedirectResponse("/login?" + urlencode({"next": wanted}), status_code=303)
