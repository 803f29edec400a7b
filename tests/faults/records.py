"""What a search leaves behind, and what must be the same of two of them whatever befell one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, select, text

from db.candidates import candidates
from db.events import Event, events_after
from db.searches import get_search
from db.tables import ResultRow
from search.candidate import Candidate

if TYPE_CHECKING:
    from tests.faults.service import Service

APART = {"seconds", "stage_seconds", "forward_seconds", "estimated_seconds", "evaluators"}
"""What a clock or the number of evaluators has said."""
WAITING = "waiting for an evaluator"
"""In a notice that only a busy machine gives cause for."""

STATES = re.compile("queued running( queued running| running)* succeeded")


class Follower:
    """Reads the events of a search as a client of its event stream does: on from the last it has seen."""

    def __init__(self, engine: Engine, search_id: int) -> None:
        self._engine, self._search_id = engine, search_id
        self.heard: list[Event] = []

    def read(self) -> list[Event]:
        """What is new."""
        new = events_after(self._engine, self._search_id, self.heard[-1].id if self.heard else 0)
        self.heard += new
        return new


@dataclass(frozen=True, slots=True)
class Record:
    """What a finished search left behind, but for ids, times and how many evaluators there were."""

    candidates: list[Candidate]
    summary: dict[str, Any]
    results: dict[str, tuple[str, Any]]
    measured: list[dict[str, Any]]
    notices: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    """As the last attempt went through them, with the steps each took."""


def record(engine: Engine, search_id: int) -> Record:
    """What there is of a search, the only one whose results are stored."""
    search, events = get_search(engine, search_id), events_after(engine, search_id, 0, limit=100_000)
    with engine.connect() as connection:
        stored = connection.execute(select(ResultRow.key, ResultRow.kind, ResultRow.value)).all()
    return Record(
        candidates(engine, search_id),
        comparable(search.summary),
        {key: (kind, comparable(value)) for key, kind, value in stored},
        [event.data for event in events if event.kind == "measured"],
        [event.data for event in events if event.kind == "notice" and WAITING not in event.data["message"]],
        stages(events),
    )


def stages(events: list[Event]) -> list[dict[str, Any]]:
    """The stages that the last attempt went through, as told."""
    last = max((event.data.get("attempt", 1) for event in events if event.kind == "stage"), default=1)
    told = [event.data for event in events if event.kind == "stage" and event.data.get("attempt", 1) == last]
    return [{name: value for name, value in comparable(one).items() if name != "attempt"} for one in told]


def comparable(value: Any) -> Any:
    """JSON without what may differ."""
    if isinstance(value, dict):
        return {name: comparable(inner) for name, inner in value.items() if name not in APART}
    return [comparable(inner) for inner in value] if isinstance(value, list) else value


def assert_undisturbed(service: Service, reference: Record) -> None:
    """The service's search has ended as if nothing had befallen it."""
    engine, search_id = service.engine, service.search_id
    search, found = get_search(engine, search_id), record(engine, search_id)
    assert search.state == "succeeded", f"{search.error}\n{service.told()}"
    assert found.candidates == reference.candidates
    assert found.results == reference.results
    assert found.summary == reference.summary
    assert found.measured == reference.measured
    assert found.notices == reference.notices
    assert found.stages == reference.stages
    assert_log_is_whole(engine, service.follower, search_id)
    assert_counted_once(engine)


def assert_log_is_whole(engine: Engine, follower: Follower, search_id: int) -> None:
    """The event log has no gap, no duplicate, and nothing after the end; who followed it has seen it all, in order."""
    follower.read()
    log = events_after(engine, search_id, 0, limit=100_000)
    assert follower.heard == log
    states = " ".join(event.data["state"] for event in log if event.kind == "state")
    assert STATES.fullmatch(states), states
    assert states.count("running") == get_search(engine, search_id).attempt
    assert log[0].data == {"state": "queued"}
    assert log[-1].data == {"state": "succeeded"}
    segment: list[int] = []
    for event in log:
        if event.kind in ("stage", "state"):
            segment = []
        elif event.kind == "progress":
            segment.append(event.data["done"])
            assert all(before <= after for before, after in pairwise(segment)), f"progress goes back: {segment}"


def assert_counted_once(engine: Engine) -> None:
    """The tallies of what was computed and finished are those of the rows that are there."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT name, label, value FROM tallies")).all()
        kinds = connection.execute(select(ResultRow.kind)).scalars().all()
    tallies = {(name, label): value for name, label, value in rows}
    assert {label: value for (name, label), value in tallies.items() if name == "results_computed"} == Counter(kinds)
    assert tallies["searches_finished", "succeeded"] == 1


def assert_nothing_left_open(engine: Engine) -> None:
    """No transaction and no lock outlives the workers."""
    others = "datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    query = f"SELECT usename, application_name, state, query FROM pg_stat_activity WHERE {others}"
    with engine.connect() as connection:
        assert not connection.execute(text(f"{query} AND xact_start IS NOT NULL")).all()
