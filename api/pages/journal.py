"""What happened to a search, in plain words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from api.metrics import announcement, rough_time
from api.pages.timeline import STAGES
from db.events import Event

KINDS = ("state", "stage", "stage_end", "notice")
"""Of the events: those that are told here. Measured points stand in the table."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that happened; `notable` is what a person should read."""

    time: datetime
    text: str
    notable: bool = False


def journal(events: Sequence[Event]) -> list[Entry]:
    """The newest first. `events` are of the kinds in `KINDS`, oldest first."""
    attempts, metric, entries = 0, None, []
    for event in events:
        attempts += event.kind == "state" and event.data["state"] == "running"
        if event.kind == "stage":
            metric = event.data.get("metric")
        data = event.data | ({"metric": metric} if event.kind == "stage_end" else {})
        entries.append(Entry(event.created_at, _TEXTS[event.kind](data, attempts), event.kind == "notice"))
    return entries[::-1]


def _state(data: dict[str, Any], attempts: int) -> str:
    again = {
        "queued": "Given back to the queue; what was measured is kept.",
        "running": f"A worker took it up again, attempt {attempts}; it goes on from what was measured.",
    }
    first = {
        "queued": "Queued.",
        "running": "A worker took it up.",
        "succeeded": "Finished.",
        "failed": "Failed.",
        "cancelled": "Cancelled.",
    }
    repeated = attempts > (data["state"] == "running")
    return again[data["state"]] if repeated and data["state"] in again else first[data["state"]]


def _stage(data: dict[str, Any], _attempts: int) -> str:
    title, about = STAGES[data["stage"]], announcement(data, passes=True)
    if about:
        return f"{title}: {about}."
    total = data.get("total") or 0
    return f"{title} began" + (f", {total} step{'s' if total != 1 else ''} at most." if total else ".")


def _stage_end(data: dict[str, Any], _attempts: int) -> str:
    reused = sum(data.get("reused", {}).values())
    found = f", with {reused} result{'s' if reused != 1 else ''} of earlier searches" if reused else ""
    by = f" by {data['metric']}" if data["metric"] else ""
    return f"{STAGES[data['stage']]}{by} took {rough_time(data['seconds'])}{found}."


_TEXTS: dict[str, Callable[[dict[str, Any], int], str]] = {
    "state": _state,
    "stage": _stage,
    "stage_end": _stage_end,
    "notice": lambda data, _attempts: str(data["message"]),
}
