"""What the worker process tells, and what it outlives."""

from datetime import timedelta

import pytest
from sqlalchemy import Engine

from db import queue
from db.searches import create_search, get_search
from search.request import SearchRequest
from workers import __main__ as process
from workers.__main__ import Worker, _without_paths


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("cannot identify image file '/srv/data/sets/imgs/a.png'", "cannot identify image file 'a.png'"),
        ("the file /srv/models/m/config.json is not JSON", "the file config.json is not JSON"),
        ("accepted: org/name, 3/4 and w4a16/w8a16", "accepted: org/name, 3/4 and w4a16/w8a16"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
    ],
)
def test_a_problem_names_files_but_not_where_they_are(told: str, kept: str) -> None:
    assert _without_paths({"detail": told, "status": 422}) == {"detail": kept, "status": 422}


def test_a_worker_that_slept_through_its_lease_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    search, _ = create_search(engine, SearchRequest.model_validate({"model": "m", "budgets": {"avg_bits": 4}}))
    worker = Worker(engine)

    def overslept(*_arguments: object) -> None:
        # Another worker took the search and this one does not know.
        queue.heartbeat(engine, queue.Claim(search.id, 1, worker._owner), timedelta(0))
        assert queue.claim(engine, "another", timedelta(minutes=1))
        worker.stop()
        raise process.Cancelled

    monkeypatch.setattr(process, "run_search", overslept)
    worker.run()
    assert (get_search(engine, search.id).state, get_search(engine, search.id).owner) == ("running", "another")
