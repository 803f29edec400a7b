"""A process that races for searches."""

from __future__ import annotations

from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier

from sqlalchemy import text

from db import queue
from db.engine import connect
from tests.aside import PATIENCE


def race(url: str, owner: str, rounds: int, barrier: Barrier, won: SimpleQueue[list[int]], *, leads: bool) -> None:
    """Claim the one search that each round makes due, together with another process; put what was got on `won`."""
    engine, got = connect(url), []
    for number in range(1, rounds + 1):
        if leads:
            with engine.begin() as connection:
                connection.execute(text(f"UPDATE searches SET state = 'queued' WHERE id = {number}"))
        barrier.wait(PATIENCE)
        claim = queue.claim(engine, owner, timedelta(hours=1))
        if claim:
            got.append(claim.search_id)
        barrier.wait(PATIENCE)
    won.put(got)
