"""Entity tags: a client that has an answer already is told so, instead of being sent it again."""

from __future__ import annotations

import hashlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UNDER = ("/v1/", "/searches/")
"""Where what is read may be large, and is asked for again and again."""
STREAM = "text/event-stream"


class EntityTags:
    """Tags what a GET of data or of a search's page answers by its content; answers 304 when `If-None-Match` has it.

    The tag is weak: it stays the same where the answer is compressed. Streams have none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and tag its answer."""
        if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].startswith(UNDER):
            await self.app(scope, receive, send)
            return
        known = Headers(scope=scope).get("If-None-Match", "")
        start: Message | None = None

        async def tagged(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_whole(message):
                start = message
                return
            if start is None:
                await send(message)
                return
            first, start = start, None
            assert not message.get("more_body", False), "what is not a stream is sent in one piece"
            tag = f'W/"{hashlib.sha256(message["body"]).hexdigest()[:32]}"'
            headers = MutableHeaders(scope=first)
            headers["ETag"] = tag
            if _matches(known, tag):
                for name in ("Content-Length", "Content-Type", "Content-Disposition"):
                    del headers[name]
                first["status"], message["body"] = 304, b""
            await send(first)
            await send(message)

        await self.app(scope, receive, tagged)


def _is_whole(start: Message) -> bool:
    """Whether a whole document follows."""
    return bool(start["status"] == 200) and not Headers(raw=start["headers"]).get("content-type", "").startswith(STREAM)


def _matches(known: str, tag: str) -> bool:
    """Whether `If-None-Match` names the tag; the comparison is the weak one."""
    bare = tag.removeprefix("W/")
    return known.strip() == "*" or any(part.strip().removeprefix("W/") == bare for part in known.split(","))
