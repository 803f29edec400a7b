"""How large a body may be, and how slow."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import BodyTooLarge, SlowBody

# What is left of the body is not read: the connection cannot be used again.
CLOSE = {"Connection": "close"}


class BodyLimit:
    """Counts what is received of a body, whatever its Content-Length says, and the time that takes.

    Reading it raises BodyTooLarge past `most` bytes, SlowBody after `seconds`.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self.app = app
        self.most = most
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a limited body."""
        received, complete, until = 0, False, 0.0

        async def limited() -> Message:
            nonlocal received, complete, until
            if complete:
                # What else is received says that the client has gone: an event stream waits for it as long as it lasts.
                return await receive()
            until = until or asyncio.get_running_loop().time() + self.seconds
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError as error:
                detail = f"the body was not complete after {self.seconds:g} s"
                raise SlowBody(detail, field="body", headers=CLOSE) from error
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.most:
                accepted = f"at most {self.most:,} bytes"
                detail = f"the body is larger than the {self.most:,} bytes that this service reads"
                raise BodyTooLarge(detail, field="body", accepted=accepted, headers=CLOSE)
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)
