"""A search with its candidates, sorted into what a reader looks for: frontier, baselines, dominated, predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from db.candidates import Group
from db.searches import Search
from search import pareto
from search.budget import BUDGETS, TOLERANCE, cost_bounds
from search.candidate import Candidate
from search.errors import InvalidRequest

Included = Literal["baselines", "dominated", "predicted"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A point beside the uniform baseline that is best at no larger cost; `ratio` is baseline loss ÷ point loss."""

    baseline: Candidate
    resource: str
    ratio: float | None


@dataclass(frozen=True)
class Frontier:
    """A search and its candidates, in order of their numbers; nothing here asks for their allocations.

    What looks at all candidates does so once.
    """

    search: Search
    candidates: tuple[Candidate, ...]

    @property
    def axes(self) -> list[str]:
        """The resources the frontier is drawn over; the first is the main one."""
        return list((self.search.summary or {}).get("axes") or ["avg_bits"])

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that were given, by name."""
        given = self.search.request["budgets"]
        return {name: given[name] for name in BUDGETS if given.get(name) is not None}

    @property
    def limits(self) -> dict[str, dict[str, float]]:
        """The budgets on some of the layers: pattern → budgets that were given, by name."""
        given: dict[str, dict[str, float | None]] = self.search.request["budgets"].get("limits") or {}
        return {
            pattern: {name: value for name, value in limit.items() if value is not None}
            for pattern, limit in given.items()
        }

    @property
    def objective(self) -> str:
        """What the best point has least of: `loss`, or the name of a budget."""
        return str(self.search.request["optimizer"].get("objective", "loss"))

    @property
    def sought(self) -> tuple[tuple[Group, str], ...]:
        """The quantities of which the best point has least: of equal ones, that with the least of the next."""
        loss: tuple[Group, str] = ("metrics", "loss")
        if self.objective == "loss":
            return loss, ("costs", self.axes[0])
        return ("costs", BUDGETS[self.objective].resource), loss

    @property
    def settled(self) -> bool:
        """Whether losses are those on the held-out split; while a search runs they are of the calibration data."""
        return self.search.state == "succeeded"

    @property
    def ends(self) -> dict[str, float]:
        """Resource → its tightest budget, in the units of the costs."""
        ends: dict[str, float] = {}
        for bound in cost_bounds(self.budgets):
            ends[bound.resource] = min(bound.limit, ends.get(bound.resource, np.inf))
        return ends

    @property
    def full_precision(self) -> dict[str, float]:
        """What the unquantized model measures (may be empty)."""
        return dict((self.search.summary or {}).get("full_precision") or {})

    @cached_property
    def measured(self) -> list[Candidate]:
        """Candidates with a measured loss, from the least cost on the main axis."""
        axis = self.axes[0]
        return sorted((point for point in self.candidates if point.loss is not None), key=lambda one: one.costs[axis])

    @cached_property
    def points(self) -> list[Candidate]:
        """The frontier: measured, fitting and undominated, from the least cost on the main axis."""
        return [point for point in self.measured if point.on_frontier]

    @cached_property
    def baselines(self) -> list[Candidate]:
        """Measured uniform configurations."""
        return [candidate for candidate in self.measured if candidate.source == "uniform"]

    @property
    def dominated(self) -> list[Candidate]:
        """Measured mixed configurations that are not on the frontier: dominated, or over a budget."""
        return [point for point in self.measured if not point.on_frontier and point.source != "uniform"]

    @property
    def predicted(self) -> list[Candidate]:
        """Candidates that were not measured."""
        return [candidate for candidate in self.candidates if candidate.loss is None]

    @property
    def searched(self) -> list[Candidate]:
        """Candidates that were measured on the calibration data and went no further."""
        return [point for point in self.predicted if "calibration_loss" in point.metrics]

    @cached_property
    def best(self) -> Candidate | None:
        """The point that fits every budget and has least of what is `sought`."""
        fitting = [point for point in self.measured if point.fits]
        return min(fitting, key=self._worth, default=None)

    def best_under(self, budgets: Mapping[str, float]) -> Candidate | None:
        """The point of least loss that keeps these budgets (by name, in their units) in place of the search's own.

        Raises InvalidRequest for a budget on what this search does not count.
        """
        bounds = cost_bounds(budgets)
        for bound in bounds:
            if any(bound.resource not in point.costs for point in self.measured):
                raise InvalidRequest(
                    f"search {self.search.id} does not count {bound.resource}",
                    field="under",
                    value=bound.budget,
                    accepted="budgets on what it counts: " + ", ".join(self.measured[0].costs),
                )
        costs = np.array([[point.costs[bound.resource] for bound in bounds] for point in self.measured])
        losses = np.array([point.metrics["loss"] for point in self.measured])
        losses[losses > budgets.get("loss_increase", np.inf)] = np.nan
        limits = np.array([bound.limit * (1 + TOLERANCE) for bound in bounds])
        found = pareto.best_under(losses, costs.reshape(len(losses), len(bounds)), limits)
        return None if found is None else self.measured[found]

    @cached_property
    def floor(self) -> float:
        """What a loss of zero counts as where logarithms are taken: a decade below the least positive one."""
        return min((p.metrics["loss"] for p in self.measured if p.metrics["loss"] > 0), default=1.0) / 10

    @cached_property
    def knee(self) -> Candidate | None:
        """Of the points in (main axis, log loss), as the chart draws them, the one farthest below the line between the
        ends; None where fewer than three or none is."""
        line = self.line(self.axes[0])
        found = pareto.knee(self._drawn(line))
        return None if found is None else line[found]

    @property
    def hypervolume(self) -> float | None:
        """How far below the worst uniform configuration the frontier lies: the mean of ln(its loss ÷ the frontier's)
        over the main axis, from the least cost of the space to the budget, and to the largest cost without one.

        It is the area that the frontier dominates in (main axis, ln loss), divided by its width. None without a
        baseline or a frontier.
        """
        axis, feasible = self.axes[0], (self.search.summary or {}).get("feasible", {})
        if not self.baselines or not self.points or axis not in feasible:
            return None
        least, most = feasible[axis]["min"], min(feasible[axis]["max"], self.ends.get(axis, np.inf))
        worst = max(max(point.metrics["loss"] for point in self.baselines), self.floor)
        if most <= least:
            return None
        area = pareto.hypervolume(self._drawn(self.line(axis)), np.array([most, np.log(worst)]))
        return float(area / (most - least))

    @property
    def reference(self) -> dict[str, Any] | None:
        """What no allocation can do better, as `search.reference.Reference` has it; None before the search ends."""
        found: dict[str, Any] | None = (self.search.summary or {}).get("reference")
        return found

    def included(self, groups: set[Included]) -> list[Candidate]:
        """The frontier with further groups, each candidate once, in order of their numbers."""
        chosen = {point.number: point for point in self.points}
        for group in groups:
            chosen |= {point.number: point for point in getattr(self, group)}
        return [chosen[number] for number in sorted(chosen)]

    def line(self, resource: str) -> list[Candidate]:
        """The fitting measured points that no other dominates in (`resource`, loss), from the least cost."""
        fitting = [point for point in self.measured if point.fits]
        if not fitting:
            return []
        keep = pareto.undominated(np.array([[point.costs[resource], point.metrics["loss"]] for point in fitting]))
        line = [point for point, kept in zip(fitting, keep, strict=True) if kept]
        return sorted(line, key=lambda point: point.costs[resource])

    def compare(self, point: Candidate, resource: str | None = None) -> Comparison | None:
        """`point` beside the best uniform baseline that costs no more of `resource` (default: the main axis).

        None when the point is unmeasured or uniform itself, or cheaper than every baseline.
        """
        resource = resource or self.axes[0]
        if point.loss is None or point.source == "uniform":
            return None
        limit = point.costs[resource] * (1 + TOLERANCE)
        cheaper = [base for base in self.baselines if base.costs[resource] <= limit]
        if not cheaper:
            return None
        baseline = min(cheaper, key=lambda base: base.metrics["loss"])
        ratio = baseline.metrics["loss"] / point.loss if point.loss > 0 else None
        return Comparison(baseline, resource, ratio)

    def table(self, groups: set[Included]) -> pd.DataFrame:
        """One row per candidate, indexed by number: what it is, then costs, metrics and predictions by name."""
        chosen = self.included(groups)
        rows = [
            {
                "source": point.source,
                "label": point.label,
                "on_frontier": point.on_frontier,
                "fits": point.fits,
                **point.costs,
                **point.metrics,
                **{f"predicted_{metric}": value for metric, value in point.predicted.items()},
            }
            for point in chosen
        ]
        index = pd.Index([point.number for point in chosen], name="number", dtype="int64")
        columns = ["source", "label", "on_frontier", "fits"]
        return pd.DataFrame(rows, index=index) if rows else pd.DataFrame(columns=columns, index=index)

    def _drawn(self, points: list[Candidate]) -> NDArray[np.float64]:
        """Points × (cost on the main axis, log loss)."""
        floor, axis = self.floor, self.axes[0]
        losses = [max(point.metrics["loss"], floor) for point in points]
        return np.column_stack([[point.costs[axis] for point in points], np.log(losses)])

    def _worth(self, point: Candidate) -> list[float]:
        return [getattr(point, group)[name] for group, name in self.sought]
