"""The events of a search as a client reads them: one class per kind, found by its name."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from db.states import Stage, State


class Event(BaseModel):
    """Something that happened to a search. One of a kind that this client does not know has its fields all the same."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    id: int
    """Resume after it by `after`; ids grow."""
    kind: str
    """`state`, `stage`, `stage_end`, `progress`, `measured` or `notice`."""
    at: datetime


class StateEvent(Event):
    """The search has another state. After `succeeded`, `failed` or `cancelled` nothing follows."""

    state: State


class StageEvent(Event):
    """A stage begins; in the sensitivity stage, a metric."""

    stage: Stage
    total: int
    """Steps ahead; 0 while nobody knows."""
    metric: str | None = None
    forward_passes: float | None = None
    """What the metric needs."""
    estimated_seconds: float | None = None


class StageEndEvent(Event):
    """A stage has ended."""

    stage: Stage
    seconds: float
    reused: dict[str, int] = {}
    """Results that other searches had computed, by kind."""


class ProgressEvent(Event):
    """So many steps of the present stage are done."""

    stage: Stage
    done: int
    total: int


class MeasuredEvent(Event):
    """A configuration was measured."""

    number: int
    label: str
    source: str
    loss: float | None
    costs: dict[str, float]
    """`size_bytes`, `avg_bits`, `bitops`, and `latency_us` where latency is counted."""


class NoticeEvent(Event):
    """Something the person may want to know."""

    message: str


KINDS: dict[str, type[Event]] = {
    "state": StateEvent,
    "stage": StageEvent,
    "stage_end": StageEndEvent,
    "progress": ProgressEvent,
    "measured": MeasuredEvent,
    "notice": NoticeEvent,
}


def read_event(fields: dict[str, str]) -> Event:
    """The event in the fields of a server-sent message. Raises ValueError where it is none."""
    kind = fields.get("event", "")
    try:
        data = json.loads(fields.get("data", ""))
    except RecursionError as error:
        raise ValueError("its data is nested too deep") from error
    if not isinstance(data, dict):
        raise ValueError("its data is no object")
    told: dict[str, Any] = {**data, "id": int(fields.get("id", "")), "kind": kind}
    return KINDS.get(kind, Event).model_validate(told)
