"""How metrics, their values and what they cost are written for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.resources import loss_text
from search.metrics import METRICS

SECONDS_UP_TO = 90
FRACTIONS_BELOW = 10
GROUPED_FROM = 1000


def rough_time(seconds: float) -> str:
    """A time as one says it: `3 s`, `40 s`, `2 min`, `1 h 10 min`."""
    if seconds < 1:
        return "under 1 s"
    if round(seconds) < SECONDS_UP_TO:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return " ".join(f"{amount} {unit}" for amount, unit in ((hours, "h"), (minutes, "min")) if amount)


def passes_number(passes: float) -> str:
    """A number of forward passes; small ones may be fractions."""
    return f"{passes:,.0f}" if passes >= FRACTIONS_BELOW else f"{passes:.2g}"


def announcement(stage: Mapping[str, Any], *, passes: bool = False) -> str:
    """The metric of a stage event and what it is expected to take: `pqi, about 2 min (85 forward passes)`.

    Empty for a stage without a metric; without the forward passes unless `passes`.
    """
    if "metric" not in stage:
        return ""
    seconds, needed = stage.get("estimated_seconds") or 0, stage.get("forward_passes") or 0
    time = f", {'about ' if seconds >= 1 else ''}{rough_time(seconds)}" if needed else ""
    number = passes_number(needed) if needed else "no"
    count = f" ({number} forward pass{'' if number == '1' else 'es'})" if passes else ""
    return f"{stage['metric']}{time}{count}"


def is_relative(metric: str) -> bool:
    """Whether the values of `metric` only rank units and schemes, and are no losses."""
    return metric in METRICS and not METRICS[metric].in_loss_units


def value_text(metric: str, value: float, stderr: float | None = None) -> str:
    """A value of `metric`, as a loss or as a relative score, with its standard error where it has one."""
    grouped = is_relative(metric) and abs(value) >= GROUPED_FROM
    size = f"{abs(value):,.0f}" if grouped else loss_text(abs(value))
    error = f" ± {float(f'{stderr:.1g}'):g}" if stderr else ""
    return ("−" if value < 0 else "") + size + error
