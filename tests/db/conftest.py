"""What the tests of the store share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import Engine, text

from db.searches import Search, create_search
from search.request import Budgets, SearchRequest


def request_for(model: str = "minilm", avg_bits: float = 4.25) -> SearchRequest:
    return SearchRequest(model=model, budgets=Budgets(avg_bits=avg_bits))


@pytest.fixture
def queued(engine: Engine) -> Search:
    """A search that waits for a worker."""
    return create_search(engine, request_for())[0]


@pytest.fixture
def expire(engine: Engine) -> Callable[[int], None]:
    """Lets the lease of a search run out."""

    def run_out(search_id: int) -> None:
        with engine.begin() as connection:
            connection.execute(
                text("UPDATE searches SET lease_until = now() - interval '1 second' WHERE id = :id"), {"id": search_id}
            )

    return run_out
