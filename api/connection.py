"""A connection to a client: what uvicorn leaves to a proxy that may not be there."""

from __future__ import annotations

import asyncio
import json
import uuid
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
# A proxy may go by the other of the two: what follows such a body is not taken for a request (RFC 9112, 6.3).
AMBIGUOUS = {b"content-length", b"transfer-encoding"}


class Connection(H11Protocol):
    """HTTP/1.1 where a request's head must be complete in `HEAD_SECONDS`, and what is no HTTP is answered a problem.

    The time begins with the connection, and again when an answer is complete: a client that goes on sending a body that
    nobody reads is cut off too.
    """

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Take what arrived; a request that is complete up to its body ends the wait."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
            if {name for name, _ in self.headers} >= AMBIGUOUS:
                self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._wait()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(HTTPStatus.BAD_REQUEST, "malformed-request", "the request is not HTTP as RFC 9112 has it")
        self.transport.close()

    def _wait(self) -> None:
        self._stop_waiting()
        self._due = self.loop.call_later(HEAD_SECONDS, self._cut)

    def _stop_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _cut(self) -> None:
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            detail = f"the head of the request was not complete after {HEAD_SECONDS:g} s"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "slow-head", detail)
        self.transport.close()

    def _refuse(self, status: HTTPStatus, kind: str, detail: str) -> None:
        identifier = uuid.uuid4().hex
        problem: dict[str, Any] = {
            "type": f"urn:bitfrontier:problem:{kind}",
            "title": status.phrase,
            "status": status,
            "detail": detail,
            "request_id": identifier,
        }
        body = json.dumps(problem).encode()
        headers = [
            ("Content-Length", str(len(body))),
            ("Content-Type", "application/problem+json"),
            ("Connection", "close"),
            ("X-Request-Id", identifier),
            ("X-Content-Type-Options", "nosniff"),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
