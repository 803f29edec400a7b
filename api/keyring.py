"""Whose key a request carries."""

from __future__ import annotations

import hashlib
import time

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from api.rates import Rates
from api.refusals import Unauthenticated
from db.errors import DatabaseUnavailable
from db.keys import Key, find_key
from db.readiness import Readiness

COOKIE = "bitfrontier_key"
# A key that was revoked opens nothing after this long; a busy one costs one query in it.
REMEMBER_SECONDS = 2.0
# For so long a key that was in force still opens the metrics of a process whose database is away: they say so.
SCRAPE_SECONDS = 600.0


class Keyring:
    """The keys that this process has seen, each remembered for `REMEMBER_SECONDS` under the digest of its token."""

    def __init__(self) -> None:
        self.rates = Rates()
        self._seen: dict[bytes, tuple[float, Key]] = {}

    async def identify(self, request: Request, token: str) -> Key:
        """The key that `token` is.

        Raises Unauthenticated when it is none that is in force, TooManyRequests when too many wrong ones came from the
        same address; a key that this process has seen in force is let in even then.
        """
        address = request.client.host if request.client else ""
        if _digest(token) not in self._seen:
            await self.rates.check_failures(address)
        key = await self._find(request, token)
        if key is None:
            await self.rates.count_failure(address)
            raise Unauthenticated(
                "the key is not known, was revoked or has expired",
                headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
            )
        return key

    async def identify_scraper(self, request: Request, token: str) -> Key:
        """The key that `token` is, or was shortly before the database went away. Raises what `identify` raises."""
        readiness: Readiness = request.app.state.readiness
        try:
            await readiness.check()
        except DatabaseUnavailable:
            until, key = self._seen.get(_digest(token), (0.0, None))
            if key is not None and time.monotonic() < until - REMEMBER_SECONDS + SCRAPE_SECONDS:
                return key
        return await self.identify(request, token)

    async def still_holds(self, request: Request) -> bool:
        """Whether the key that let `request` in is still in force."""
        token = token_of(request)
        return token is not None and await self._find(request, token) is not None

    async def _find(self, request: Request, token: str) -> Key | None:
        digest, now = _digest(token), time.monotonic()
        until, key = self._seen.get(digest, (0.0, None))
        if key is not None and now < until:
            return key
        found = await run_in_threadpool(find_key, request.app.state.engine, token)
        if found is None:
            self._seen.pop(digest, None)
        else:
            self._seen[digest] = (now + REMEMBER_SECONDS, found)
        return found


def bearer_token(request: Request) -> str | None:
    """The token in Authorization."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def token_of(request: Request) -> str | None:
    """The token in Authorization, else the one that a browser keeps."""
    return bearer_token(request) or request.cookies.get(COOKIE)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
