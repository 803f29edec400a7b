"""Clients that post, list, show, follow and cancel searches, each one request after the other."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

REQUEST = {"model": "org/model", "budgets": {"avg_bits": 4.5}}
"""Of a model that nobody has seen: it is accepted and waits for a worker."""

PATIENCE_SECONDS = 30.0


@dataclass
class Seen:
    """What one process of clients has seen: seconds of each request by kind, and errors by what went wrong."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0.0

    def add(self, kind: str, seconds: float) -> None:
        """One request of a kind took so long."""
        self.seconds.setdefault(kind, []).append(seconds)

    def merge(self, other: Seen) -> None:
        """Take over what another process has seen."""
        for kind, seconds in other.seconds.items():
            self.seconds.setdefault(kind, []).extend(seconds)
        self.errors += other.errors
        self.cpu_seconds += other.cpu_seconds


def run(url: str, keys: list[str], seconds: float, pause: float) -> Seen:
    """A client for each key, with a connection of its own, for so long; they wait `pause` seconds between requests,
    half more or less."""
    began, seen = time.process_time(), Seen()
    asyncio.run(_all(url, keys, seconds, pause, seen))
    seen.cpu_seconds = time.process_time() - began
    return seen


async def _all(url: str, keys: list[str], seconds: float, pause: float, seen: Seen) -> None:
    # Together they build a connection pool that searches all its connections at every request; each has its own.
    context, deadline = httpx.create_ssl_context(verify=False), time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        for key in keys:
            headers = {"Authorization": f"Bearer {key}"}
            http = httpx.AsyncClient(
                base_url=url, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False, verify=context
            )
            tasks.create_task(_Client(http, deadline, pause, seen).run())


class _Client:
    def __init__(self, http: httpx.AsyncClient, deadline: float, pause: float, seen: Seen) -> None:
        self._http, self._deadline, self._pause, self._seen = http, deadline, pause, seen

    async def run(self) -> None:
        """Go round until the time is over."""
        async with self._http:
            await self._rest()
            while time.monotonic() < self._deadline:
                try:
                    await self._round()
                except (httpx.HTTPError, TimeoutError) as error:
                    self._seen.errors[f"{type(error).__name__}: {error}"] += 1

    async def _round(self) -> None:
        posted = await self._ask("post", "POST", "/v1/searches", 202, json=REQUEST)
        if posted is None:
            return
        path = f"/v1/searches/{posted['id']}"
        await self._ask("list", "GET", "/v1/searches?limit=20", 200)
        await self._ask("show", "GET", path, 200)
        async with self._follow(path) as states:
            if await anext(states, None) is None:
                return
            await self._rest()
            began = time.monotonic()
            cancelled = await self._ask("cancel", "POST", f"{path}/cancel", 200)
            if cancelled is None:
                return
            async for state in states:
                if state == "cancelled":
                    self._seen.add("news", time.monotonic() - began)
                    break
        await self._rest()

    async def _ask(
        self, kind: str, method: str, path: str, status: int, json: object = None
    ) -> dict[str, object] | None:
        began = time.monotonic()
        response = await self._http.request(method, path, json=json)
        self._seen.add(kind, time.monotonic() - began)
        if response.status_code != status:
            self._seen.errors[f"{kind}: {response.status_code} {response.text[:200]}"] += 1
            return None
        if kind not in ("post", "cancel"):
            await self._rest()
        found: dict[str, object] = response.json()
        return found

    @asynccontextmanager
    async def _follow(self, path: str) -> AsyncIterator[AsyncIterator[str]]:
        """The states that the event stream tells; `follow` is the time until it tells the first."""
        began = time.monotonic()
        async with self._http.stream("GET", f"{path}/events") as response:
            if response.status_code != 200:
                self._seen.errors[f"follow: {response.status_code}"] += 1

            async def states() -> AsyncIterator[str]:
                first = True
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        if first:
                            self._seen.add("follow", time.monotonic() - began)
                        first = False
                        yield json.loads(line.removeprefix("data: ")).get("state", "")

            yield states()

    async def _rest(self) -> None:
        if self._pause:
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.5))
