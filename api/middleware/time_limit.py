"""How long an answer may take to begin."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import TookTooLong


class TimeLimit:
    """Raises TookTooLong when an answer has not begun after `seconds`; one that has begun may take as long as it likes.

    A thread that works on the answer is not stopped by it, but by the database's own limit on a statement.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and stop waiting for its answer in time."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = asyncio.timeout(self.seconds)

        async def begun(message: Message) -> None:
            limit.reschedule(None)
            await send(message)

        try:
            async with limit:
                await self.app(scope, receive, begun)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TookTooLong(f"there was no answer within {self.seconds:g} s; try again later") from error
