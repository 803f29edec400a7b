"""What the tests of the store share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from db import queue
from db.queue import Claim
from db.searches import Search, create_search
from search.request import Budgets, SearchRequest

LEASE = timedelta(seconds=30)


def request_for(model: str = "minilm", avg_bits: float = 4.25) -> SearchRequest:
    return SearchRequest(model=model, budgets=Budgets(avg_bits=avg_bits))


def taken(engine: Engine, owner: str = "one") -> Claim:
    """The claim of the next search, which must be there."""
    claim = queue.claim(engine, owner, LEASE)
    assert claim is not None
    return claim


def postmaster(folder: Path) -> int:
    """The number of the process that is the Postgres in `folder`."""
    return int((folder / "postmaster.pid").read_text().splitlines()[0])


@pytest.fixture
def queued(engine: Engine) -> Search:
    """A search that waits for a worker."""
    return create_search(engine, request_for())[0]


@pytest.fixture
def claim(engine: Engine, queued: Search) -> Claim:
    """A claim on the queued search."""
    return taken(engine)


@pytest.fixture
def expire(engine: Engine) -> Callable[[int], None]:
    """Lets the lease of a search run out."""

    def run_out(search_id: int) -> None:
        with engine.begin() as connection:
            connection.execute(
                text("UPDATE searches SET lease_until = now() - interval '1 second' WHERE id = :id"), {"id": search_id}
            )

    return run_out
