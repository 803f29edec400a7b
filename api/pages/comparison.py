"""Up to four searches beside each other: their frontiers on one chart, and how much each dominates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import log
from typing import Any

import numpy as np

from api.frontier import Frontier
from api.resources import RESOURCES, loss_text
from search import pareto
from search.candidate import Candidate

MOST = 4
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
DASHES = ("solid", "dash", "dot", "dashdot")
"""A search is told by its marker and its line as well as by its colour."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The corner that hypervolumes are measured from: the largest cost and loss that are shown; `least` is the least
    cost."""

    cost: float
    loss: float
    least: float


@dataclass(frozen=True, slots=True)
class Compared:
    """A row of the table. `hypervolume` is the mean of ln(reference loss ÷ loss of the frontier) over the costs from
    the least to the reference; None where there is no frontier."""

    frontier: Frontier
    best: Candidate | None
    evaluations: float | None
    hypervolume: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Searches, drawn over a resource that all of them count."""

    frontiers: Sequence[Frontier]
    axis: str

    @property
    def lines(self) -> list[list[Candidate]]:
        """The points of each search that no other of it dominates in (axis, loss)."""
        return [frontier.line(self.axis) for frontier in self.frontiers]

    @property
    def floor(self) -> float:
        """What a loss of zero counts as where logarithms are taken."""
        return min((frontier.floor for frontier in self.frontiers), default=0.1)

    @property
    def reference(self) -> Reference | None:
        """The common corner; None while nothing is measured, or where all points cost the same."""
        shown = [point for line in self.lines for point in line]
        if not shown:
            return None
        costs = [point.costs[self.axis] for point in shown]
        baselines = [point for frontier in self.frontiers for point in frontier.baselines]
        loss = max(max(point.metrics["loss"], self.floor) for point in [*shown, *baselines])
        return Reference(max(costs), loss, min(costs)) if max(costs) > min(costs) else None

    @property
    def rows(self) -> list[Compared]:
        """What the table says of each search."""
        corner = self.reference
        return [
            Compared(
                frontier,
                frontier.best,
                (frontier.search.summary or {}).get("evaluations"),
                self._hypervolume(line, corner) if corner and line else None,
            )
            for frontier, line in zip(self.frontiers, self.lines, strict=True)
        ]

    def _hypervolume(self, line: list[Candidate], corner: Reference) -> float:
        points = np.array([[point.costs[self.axis], log(max(point.metrics["loss"], self.floor))] for point in line])
        area = pareto.hypervolume(points, np.array([corner.cost, log(corner.loss)]))
        return area / (corner.cost - corner.least)

    @property
    def reference_text(self) -> str:
        """The corner in words; empty without one."""
        corner = self.reference
        return f"loss {loss_text(corner.loss)} at {RESOURCES[self.axis].text(corner.cost)}" if corner else ""

    def payload(self) -> str:
        """The figure as JSON that may stand inside a script element: a trace per search, and its uniform baselines.

        `meta` is the place of the search, from which the page's script takes its colour; `customdata` the path of each
        point's page.
        """
        traces = [
            trace
            for place, (frontier, line) in enumerate(zip(self.frontiers, self.lines, strict=True))
            for trace in (self._line(place, frontier, line), self._baselines(place, frontier))
            if trace["x"]
        ]
        layout = {
            "xaxis": {"title": {"text": RESOURCES[self.axis].title}},
            "yaxis": {"title": {"text": "Loss against full precision"}, "type": "log"},
        }
        figure = {"data": traces, "layout": layout}
        return json.dumps(figure, allow_nan=False).replace("<", "\\u003c")

    def _line(self, place: int, frontier: Frontier, line: list[Candidate]) -> dict[str, Any]:
        return self._trace(place, frontier, line) | {
            "mode": "lines+markers",
            "name": name(frontier),
            "legendrank": place,
            "line": {"width": 2, "shape": "hv", "dash": DASHES[place]},
            "marker": {"size": 9, "symbol": SYMBOLS[place]},
        }

    def _baselines(self, place: int, frontier: Frontier) -> dict[str, Any]:
        return self._trace(place, frontier, frontier.baselines) | {
            "mode": "markers",
            "name": f"uniform, search {frontier.search.id}",
            "legendrank": MOST + place,
            "visible": "legendonly",
            "marker": {"size": 10, "symbol": f"{SYMBOLS[place]}-open"},
        }

    def _trace(self, place: int, frontier: Frontier, points: list[Candidate]) -> dict[str, Any]:
        scale = RESOURCES[self.axis].scale
        return {
            "type": "scatter",
            "meta": place,
            "x": [point.costs[self.axis] / scale for point in points],
            "y": [max(point.metrics["loss"], self.floor) for point in points],
            "customdata": [f"/searches/{frontier.search.id}/points/{point.number}" for point in points],
            "text": [_hover(frontier, point) for point in points],
            "hovertemplate": "%{text}<extra></extra>",
        }


def name(frontier: Frontier) -> str:
    """A search in the legend, as Plotly shows it."""
    return f"{frontier.search.id} · {escape(frontier.search.model, quote=False)}"


def _hover(frontier: Frontier, point: Candidate) -> str:
    costs = " · ".join(words.text(point.costs[key]) for key, words in RESOURCES.items() if key in point.costs)
    title = f"Search {frontier.search.id}, <b>point {point.number}</b>  {escape(point.label, quote=False)}"
    return "<br>".join([title, f"loss {loss_text(point.loss)}", costs])


def shared_axes(frontiers: Sequence[Frontier]) -> list[str]:
    """The resources that every measured point of every search counts, the first search's main axis first."""
    measured = [frontier.measured for frontier in frontiers if frontier.measured]
    if not measured:
        return []
    shared = [axis for axis in RESOURCES if all(axis in point.costs for points in measured for point in points)]
    return sorted(shared, key=lambda axis: axis != frontiers[0].axes[0])


def cautions(frontiers: Sequence[Frontier]) -> list[str]:
    """Why the losses, or what was found, may not be compared; empty where they may."""
    told = [f"Search {one.search.id} is {one.search.state}: {_unfinished(one)}" for one in frontiers if not one.settled]
    for words, key in (("models", "model_digest"), ("tasks", "task"), ("data", "data_digest")):
        kinds = {(one.search.summary or {}).get(key) for one in frontiers} - {None}
        if len(kinds) > 1:
            told.append(f"These searches are of different {words}: {CONSEQUENCES[words]}")
            break
    return [*told, *_other_layers(frontiers)]


def _other_layers(frontiers: Sequence[Frontier]) -> list[str]:
    """That searches of one model chose the bits of different layers; of different models, that is no news."""
    known = [one.search for one in frontiers if "layers" in (one.search.summary or {})]
    summaries = [search.summary or {} for search in known]
    models = {summary["model_digest"] for summary in summaries}
    layers = [frozenset(layer["name"] for layer in summary["layers"]) for summary in summaries]
    if len(models) != 1 or len(set(layers)) == 1:
        return []
    counts = ", ".join(
        f"search {search.id}: {len(names)} for {search.target}" for search, names in zip(known, layers, strict=True)
    )
    return [f"These searches chose the bits of different layers ({counts}): {CONSEQUENCES['layers']}"]


CONSEQUENCES = {
    "models": "each loss is against its own full-precision model, so compare shapes and not heights.",
    "tasks": "their losses are different quantities, so compare shapes and not heights.",
    "data": "their losses were measured on different samples, so small differences say nothing.",
    "layers": "their bits per weight are of different weights, so compare them by another cost.",
}


def _unfinished(frontier: Frontier) -> str:
    if not frontier.measured:
        return "nothing of it is measured, and it is not drawn."
    return "what is drawn is what was measured so far, on the calibration data."
