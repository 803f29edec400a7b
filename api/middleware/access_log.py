"""Every request is written down when it is over: a line in the log, and an observation for `/metrics`."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.telemetry import Telemetry

logger = logging.getLogger("api.access")

# What is asked every few seconds by machines that look after us.
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})


class AccessLog:
    """Logs method, path, status, time and address; never headers, queries or bodies, which may hold secrets."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self.app = app
        self.telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and write down how it went."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Without an answer the client has gone, or the server logs why.
        status, start, seconds = 499, time.perf_counter(), None

        async def watched(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                # To the first byte: a stream is open for as long as somebody looks at it.
                status, seconds = message["status"], time.perf_counter() - start
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            end = time.perf_counter() - start
            self.telemetry.observe(scope, status, end if seconds is None else seconds)
            path = (scope.get("raw_path") or b"").partition(b"?")[0].decode("ascii", errors="replace")
            level = logging.DEBUG if path in QUIET and status < 400 else logging.INFO
            about = {"method": scope["method"], "path": path, "status": status, "milliseconds": round(1000 * end, 1)}
            client = scope.get("client")
            logger.log(
                level,
                "%(method)s %(path)s %(status)d %(milliseconds).1f ms",
                about,
                extra=about | {"client": client[0] if client else None},
            )
