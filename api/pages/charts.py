"""What the chart of a search is drawn from: its points as columns of numbers, and which of them are the frontier.

The page's script (static/chart.js) makes a Plotly figure of it, for the axes and scales that a person chooses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from api.frontier import Frontier
from api.pages.render import STATIC, plotly_script, template
from api.resources import RESOURCES
from search import pareto
from search.candidate import Candidate

Document = dict[str, Any]

DIGITS = 5
"""Significant ones of every number."""

ROLES = ("baseline", "fits", "over", "rejected", "searched")
"""What a drawn point is: a uniform baseline; measured and within the budgets, or over one; rejected on the acceptance
data; searched on the calibration data alone."""

QUANTITIES = {"loss": "Loss against full precision", "perplexity": "Perplexity", "accuracy": "Accuracy, %"}
SCALES = {"accuracy": 100.0}
MOST = frozenset({"accuracy"})
"""Of these quantities more is better."""


def chart_document(frontier: Frontier) -> Document:
    """All that is drawn; empty while nothing is measured.

    `x` and `y` describe the axes by the names of their columns, the main ones first. `points` has a column for each,
    in the unit that is shown, beside `number`, `label`, `role` (an index into `ROLES`), `loss_stderr` and what was
    expected of the loss. `lines` has the frontier of every pair of axes, as rows of the columns.
    """
    points = [point for point in frontier.candidates if shown_loss(point) is not None]
    if not any(point.loss is not None for point in points):
        return {}
    x = [name for name in RESOURCES if all(name in point.costs for point in points)]
    x.sort(key=lambda name: frontier.axes.index(name) if name in frontier.axes else len(RESOURCES))
    y = [name for name in QUANTITIES if any(name in point.metrics for point in points)]
    columns, best, knee = _columns(frontier, points, x, y), frontier.best, frontier.knee
    return {
        "x": {name: _cost_axis(frontier, name) for name in x},
        "y": {name: _quality_axis(frontier, name) for name in y},
        "points": {"number": [point.number for point in points], "label": [point.label for point in points]}
        | {"role": [ROLES.index(role(point)) for point in points]}
        | {name: _short(column) for name, column in columns.items()},
        "lines": {name: {of: _line(points, columns[name], columns[of], of in MOST) for of in y} for name in x},
        "best": best.number if best else None,
        "knee": knee.number if knee else None,
        "reference": _reference(frontier),
    }


def standalone_page(frontier: Frontier, headline: str) -> str:
    """The frontier under the sentence `headline`, as one HTML file that needs nothing else."""
    return template(
        "standalone.html",
        frontier=frontier,
        search=frontier.search,
        headline=headline,
        rows=frontier.measured,
        payload=payload(frontier),
        style=(STATIC / "bitfrontier.css").read_text() + (STATIC / "search.css").read_text(),
        script=(STATIC / "chart.js").read_text(),
        plotly_script=plotly_script().read_text(),
    )


def payload(frontier: Frontier) -> str:
    """The document as JSON that may stand inside a script element."""
    return json.dumps(chart_document(frontier), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def shown_loss(point: Candidate) -> float | None:
    """The loss of a measured point; of one that went no further, that on the calibration data."""
    return point.metrics.get("calibration_loss") if point.loss is None else point.loss


def role(point: Candidate) -> str:
    """One of `ROLES`."""
    if point.loss is None:
        return "rejected" if "acceptance_loss" in point.metrics else "searched"
    return "baseline" if point.source == "uniform" else "fits" if point.fits else "over"


def baseline_name(point: Candidate) -> str:
    """A uniform baseline by its scheme."""
    return point.label.removeprefix("uniform").strip(" :") or point.label


def _columns(frontier: Frontier, points: list[Candidate], x: list[str], y: list[str]) -> dict[str, list[float | None]]:
    """The numbers of the points, as they are shown."""
    floor = frontier.floor
    losses = [shown_loss(point) for point in points]
    columns: dict[str, list[float | None]] = {
        name: [point.costs[name] / RESOURCES[name].scale for point in points] for name in x
    }
    columns["loss"] = [None if loss is None else max(loss, floor) for loss in losses]
    columns["loss_stderr"] = [point.metrics.get("loss_stderr") for point in points]
    columns |= {name: [_scaled(point.metrics.get(name), name) for point in points] for name in y if name != "loss"}
    ends = {"expected": "loss", "expected_low": "low", "expected_high": "high"}
    return columns | {name: [point.expected.get(end) for point in points] for name, end in ends.items()}


def _line(points: list[Candidate], x: list[float | None], y: list[float | None], most: bool) -> list[int]:
    """The rows of the measured, fitting points that no other dominates on two axes, from the least cost."""
    rows = [row for row, point in enumerate(points) if point.fits and point.loss is not None and y[row] is not None]
    if not rows:
        return []
    drawn = np.array([[x[row], y[row]] for row in rows], dtype=float) * [1, -1 if most else 1]
    kept = [row for row, keep in zip(rows, pareto.undominated(drawn), strict=True) if keep]
    return sorted(kept, key=lambda row: x[row] or 0.0)


def _cost_axis(frontier: Frontier, name: str) -> Document:
    words = RESOURCES[name]
    axis: Document = {"title": words.title, "short": words.short, "unit": words.unit}
    return axis | ({"budget": frontier.ends[name] / words.scale} if name in frontier.ends else {})


def _quality_axis(frontier: Frontier, name: str) -> Document:
    data = "" if frontier.settled else ", on calibration data"
    axis: Document = {"title": QUANTITIES[name] + data, "short": name.capitalize()}
    if name == "loss" and "loss_increase" in frontier.budgets:
        axis["budget"] = frontier.budgets["loss_increase"]
    if name in frontier.full_precision:
        axis["full"] = _scaled(frontier.full_precision[name], name)
    return axis


def _reference(frontier: Frontier) -> Document | None:
    """What no allocation can do better, in the unit that is shown; None before the search ends."""
    found = frontier.reference
    if found is None:
        return None
    lines = {name: _short(found[name]) for name in ("lower_bound", "rate_distortion") if found[name]}
    scale = RESOURCES[found["axis"]].scale
    return {"axis": found["axis"], "levels": _short(level / scale for level in found["levels"])} | lines


def _scaled(value: float | None, name: str) -> float | None:
    return None if value is None else value * SCALES.get(name, 1.0)


def _short(numbers: Iterable[float | None]) -> list[float | None]:
    return [None if number is None else float(f"{number:.{DIGITS}g}") for number in numbers]
