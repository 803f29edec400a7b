"""What a search goes through: the allocations within all budgets, at several levels of one resource."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from search import ilp
from search.budget import TOLERANCE, Bound
from search.cost import Cost, Resource

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]
"""A scheme index for every unit."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Sweep:
    """Allocations that keep all `bounds`, at totals of `axis` of at most each of `levels`, from the highest."""

    costs: Mapping[Resource, Cost]
    bounds: Sequence[Bound]
    axis: Resource
    levels: Floats

    @classmethod
    def of(
        cls,
        costs: Mapping[Resource, Cost],
        bounds: Sequence[Bound],
        axis: Resource,
        points: int,
        also: Sequence[Choice] = (),
    ) -> Sweep:
        """`points` levels, evenly spaced from the budget down, and those of the allocations in `also` that are within
        all bounds: the uniform ones, with which the others will be compared. Bounds that everything keeps are left out.
        """
        bounds = [bound for bound in bounds if not bound.admits(costs[bound.resource].largest)]
        sweep = cls(costs, bounds, axis, ilp.levels(costs, bounds, axis, points))
        own = [costs[axis].total(choice) for choice in also if sweep.admits(choice)]
        return cls(costs, bounds, axis, np.unique([*sweep.levels, *own])[::-1])

    @property
    def limit(self) -> float:
        """The highest level."""
        return float(self.levels[0])

    @property
    def roomy(self) -> list[float]:
        """The levels at which there is more than the cheapest allocation."""
        return [level for level in self.levels.tolist() if level > self.costs[self.axis].smallest * (1 + TOLERANCE)]

    @property
    def open(self) -> NDArray[np.bool_]:
        """Which choices each unit has; units × schemes."""
        open_: NDArray[np.bool_] = np.all([np.isfinite(cost.table) for cost in self.costs.values()], axis=0)
        return open_

    def admits(self, choice: Choice) -> bool:
        """Whether an allocation keeps all bounds."""
        return all(bound.admits(self.costs[bound.resource].total(choice)) for bound in self.bounds)

    def totals(self, choices: Sequence[Choice] | NDArray[np.int64]) -> Floats:
        """What each allocation costs along the axis."""
        return np.array([self.costs[self.axis].total(choice) for choice in choices], dtype=float)

    def frontier(self, loss: Floats, levels: Floats | None = None, *, prove: bool = False) -> list[Choice]:
        """The allocation of least predicted loss (units × schemes) at every level, or at some; each once.

        Without `prove`, near it at once: predictions are not exact either.
        """
        at = self.levels if levels is None else levels
        found = ilp.frontier(loss, self.costs, self.bounds, self.axis, at, prove=prove)
        return [solution.choice for solution in found if solution.choice is not None]


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(at)] for at in np.linspace(0, len(items) - 1, most)]
