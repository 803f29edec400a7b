"""How far a search is: its stages, what each took, and how long the present one may last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from api.documents import FINISHED
from api.metrics import announcement, rough_time
from db.events import Event
from db.searches import Search

STAGES = {
    "profile": "Profile",
    "sensitivity": "Sensitivities",
    "baselines": "Baselines",
    "optimize": "Optimize",
    "measure": "Measure",
    "refine": "Refine",
    "evolve": "Evolve",
    "accept": "Accept",
}
LOOPS = {"ilp": (), "evolution": ("evolve",)}
"""By the method: what comes between measuring and accepting; `refine` for the others."""

LEAST = 1.0
"""Seconds that a step under way is taken to last at least."""

Standing = Literal["done", "now", "ahead"]


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage: whether it is done, and what that took."""

    name: str
    title: str
    standing: Standing
    took: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """The stages of a search. Of the present one: its counts (`total` is 0 where it has none), the metric it fills, how
    long it has gone on, and an estimate of what is left, with what that rests on."""

    stages: list[StageView]
    title: str
    about: str
    done: int
    total: int
    elapsed: str
    left: str


def timeline(search: Search, events: Sequence[Event], step: Event | None, now: datetime) -> Timeline:
    """As it stands at `now`; `events` are those of the kinds `stage` and `stage_end`, `step` the last `progress`."""
    method = search.request["optimizer"]["method"]
    names = [name for name in STAGES if name not in ("refine", "evolve") or name in LOOPS.get(method, ("refine",))]
    spent = Counter[str]()
    for event in events:
        if event.kind == "stage_end":
            spent[event.data["stage"]] += event.data["seconds"]
    at = names.index(search.stage) if search.stage in names else -1
    running = search.state not in FINISHED and at >= 0
    entered = [event for event in events if event.kind == "stage" and event.data["stage"] == search.stage]
    since = (now - entered[-1].created_at).total_seconds() if running and entered else 0.0
    return Timeline(
        [
            StageView(name, STAGES[name], _standing(search, place, at), rough_time(spent[name]) if spent[name] else "")
            for place, name in enumerate(names)
        ],
        STAGES[search.stage] if running and search.stage else "",
        announcement(entered[-1].data, passes=True) if running and entered else "",
        search.done,
        search.total,
        rough_time(since) if since >= 1 else "",
        _left(entered[-1], step, now) if running and entered else "",
    )


def _standing(search: Search, place: int, at: int) -> Standing:
    if place < at or search.state == "succeeded":
        return "done"
    return "now" if place == at and search.state == "running" else "ahead"


def _left(entered: Event, step: Event | None, now: datetime) -> str:
    """By the pace of the present stage up to its last `step`; before its first by what was announced. Empty where
    nothing tells."""
    since = (now - entered.created_at).total_seconds()
    if step and step.id > entered.id and step.data["done"]:
        done, total = step.data["done"], step.data["total"]
        pace = (step.created_at - entered.created_at).total_seconds() / done
        # The steps after the present one are ahead however long that takes.
        left = max(pace * (total - done) - (now - step.created_at).total_seconds(), pace * (total - done - 1), LEAST)
        return f"about {rough_time(left)} left at this pace" if done < total else ""
    expected = entered.data.get("estimated_seconds") or 0
    return f"about {rough_time(expected - since)} left as announced" if expected > since else ""
