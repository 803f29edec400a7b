"""Five hundred clients hold event streams open: everybody is heard, and they cost neither threads nor much memory."""

from __future__ import annotations

import asyncio
import re

import httpx
import psutil
import pytest
from sqlalchemy import Engine

from db.queue import progress
from tests.api import examples
from tests.aside import PATIENCE
from tests.attacks.conftest import api_process

pytestmark = pytest.mark.long

CLIENTS = 500
MOST_KB_A_CLIENT = 200


async def follow(port: int, search_id: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An event stream that has told what was before."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /v1/searches/{search_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    await reader.readuntil(b'"running"')
    return reader, writer


async def get(port: int, path: str) -> str:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
        answer = await client.get(path)
    assert answer.status_code == 200
    return answer.text


async def open_streams(port: int) -> int:
    found = re.search(r"^bitfrontier_event_streams (\d+)", await get(port, "/metrics"), re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_five_hundred_streams(engine: Engine, postgres_url: str) -> None:
    search_id, held = examples.claimed_search(engine)

    async def attack(port: int, api: psutil.Process) -> None:
        # Threads for requests come with the first ones that need them, whoever sends them.
        await asyncio.gather(*(get(port, "/v1/searches") for _ in range(60)))
        threads, memory = api.num_threads(), api.memory_info().rss
        async with asyncio.timeout(PATIENCE):
            streams = await asyncio.gather(*(follow(port, search_id) for _ in range(CLIENTS)))
        assert await open_streams(port) == CLIENTS
        for path in ("/healthz", "/readyz", "/v1/searches", f"/v1/searches/{search_id}", "/"):
            await get(port, path)
        await asyncio.to_thread(progress, engine, held, "measure", 7, 9)
        async with asyncio.timeout(PATIENCE):
            heard = await asyncio.gather(*(reader.readuntil(b'"measure"') for reader, _ in streams))
        assert len(heard) == CLIENTS
        assert api.num_threads() <= max(threads, 45), "no thread each: those that read for all are bounded"
        assert api.memory_info().rss - memory < CLIENTS * MOST_KB_A_CLIENT * 1000
        for number, (_, writer) in enumerate(streams):
            # Half of them say goodbye; the others are just gone.
            writer.close() if number % 2 else writer.transport.abort()
        async with asyncio.timeout(PATIENCE):  # They are let go.
            while await open_streams(port):
                await asyncio.sleep(0.1)

    with api_process(postgres_url) as (port, api):
        asyncio.run(attack(port, api))
