"""The point that the page of a search has selected, in short."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine

from api.frontier import Frontier
from api.pages.points import rejection
from api.pages.strip import Strip, allocation_strip
from api.pages.views import best_verdict, verdict
from api.resources import RESOURCES
from db.candidates import candidate
from search.candidate import Candidate

EXTRA = {"perplexity": "{:.3f}", "accuracy": "{:.1%}"}


@dataclass(frozen=True, slots=True)
class Selected:
    """A point with its numbers, what is to be said of it, its allocation, and the neighbours on the frontier."""

    point: Candidate
    is_best: bool
    verdict: str
    numbers: list[tuple[str, str, str]]
    strip: Strip
    cheaper: int | None
    better: int | None


def selected_point(engine: Engine, frontier: Frontier, number: int | None) -> Selected | None:
    """The point `number`, or the best one where it is None or no point of this search; None without either."""
    best = frontier.best
    wanted = number if number is not None else best.number if best else None
    point = None if wanted is None else candidate(engine, frontier.search.id, wanted)
    if point is None and best is not None:
        point = candidate(engine, frontier.search.id, best.number)
    if point is None:
        return None
    is_best = best is not None and best.number == point.number
    line = [other.number for other in frontier.points]
    place = line.index(point.number) if point.number in line else None
    layers = (frontier.search.summary or {}).get("layers") or []
    return Selected(
        point,
        is_best,
        best_verdict(frontier) if is_best else whole_verdict(frontier, point),
        _numbers(point),
        allocation_strip(point, layers),
        line[place - 1] if place else None,
        line[place + 1] if place is not None and place + 1 < len(line) else None,
    )


def whole_verdict(frontier: Frontier, point: Candidate) -> str:
    """How a point stands against the uniform baselines; of one that was rejected, also by which."""
    rejected = point.loss is None and "acceptance_loss" in point.metrics
    standing = [other for other in frontier.measured if "acceptance_loss" in other.metrics]
    return " ".join([verdict(frontier, point), *([rejection(point, standing)] if rejected else [])])


def _numbers(point: Candidate) -> list[tuple[str, str, str]]:
    """Name, number and unit of what it costs and what was measured, the loss apart."""
    costs = [(words.short, words.number(point.costs[name]), words.unit) for name, words in RESOURCES.items()
             if name in point.costs]  # fmt: skip
    extra = [(name.capitalize(), form.format(point.metrics[name]), "") for name, form in EXTRA.items()
             if name in point.metrics]  # fmt: skip
    return [(name, number, "" if unit == "bits" else unit) for name, number, unit in costs] + extra
