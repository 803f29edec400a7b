"""What to measure next: the configurations from which the frontier is expected to gain most.

The gain of a measurement is the area that it adds between the frontier and a corner, in cost × log loss (expected
hypervolume improvement, Emmerich et al. 2006). A log loss is expected to be normal, so that the area has a closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import erf, sqrt

import numpy as np
from numpy.typing import NDArray

from search import knapsack
from search.pareto import undominated
from search.surrogate import Surrogate

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]

DRAWS = 16
LEVELS = 24
SWAPS = 512
"""What may be measured next: the frontiers of so many draws of the posterior, at so many levels of the cost, and as
many switches of single units, at most, from configurations of the measured frontier."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Costs and log losses of measured configurations; beyond the `corner`, (cost, log loss), nothing counts."""

    costs: Floats
    logs: Floats
    corner: tuple[float, float]

    @property
    def frontier(self) -> NDArray[np.int64]:
        """The undominated ones within the corner, from the cheapest; indices."""
        points = np.column_stack([self.costs, self.logs])
        kept = np.flatnonzero(undominated(points) & (points < self.corner).all(axis=1))
        return kept[self.costs[kept].argsort(kind="stable")]

    def gain(self, costs: Floats, means: Floats, deviations: Floats) -> Floats:
        """The area that configurations of these costs, and normal log losses, are expected to add."""
        frontier = self.frontier
        begins = np.append(-np.inf, self.costs[frontier])
        ends = np.append(begins[1:], self.corner[0])
        levels = np.append(self.corner[1], self.logs[frontier])
        widths = (ends - np.maximum(begins, costs[:, None])).clip(min=0)
        deviations = np.maximum(deviations, 1e-12)[:, None]
        z = (levels - means[:, None]) / deviations
        density = np.exp(-(z**2) / 2) / sqrt(2 * np.pi)
        gains: Floats = (widths * deviations * (z * _normal_cdf(z) + density)).sum(axis=1)
        return gains

    def and_one(self, cost: float, log: float) -> Measured:
        """These and one more."""
        return Measured(np.append(self.costs, cost), np.append(self.logs, log), self.corner)


def propose(
    surrogate: Surrogate,
    cost: Floats,
    limit: float,
    admits: Callable[[Choice], bool],
    choices: NDArray[np.int64],
    losses: Floats,
    count: int,
    generator: np.random.Generator,
) -> tuple[list[Choice], float]:
    """At most `count` choices to measure next, most gainful first, and the area that the first is expected to gain.

    `cost` is units × schemes (inf where closed), its total at most `limit`; `admits` says whether a choice keeps the
    other budgets. `choices` and `losses` are what is measured. Each choice is taken as if those before it had given
    what is expected of them.
    """
    known = np.asarray(losses) > 0
    rows = np.arange(cost.shape[0])
    measured = Measured(
        cost[rows, choices[known]].sum(axis=1),
        np.log(losses[known]),
        (limit * (1 + 1e-9), float(np.log(losses[known].max())) + 1e-9),
    )
    seen = {choice.tobytes() for choice in choices}
    candidates = {
        choice.tobytes(): choice
        for choice in _candidates(surrogate, cost, limit, choices[known][measured.frontier], generator)
        if choice.tobytes() not in seen and admits(choice)
    }
    if not candidates:
        return [], 0.0
    pool = np.array(list(candidates.values()))
    costs = cost[rows, pool].sum(axis=1)
    means, deviations = surrogate.predict(pool)
    found: list[Choice] = []
    first = 0.0
    for _ in range(min(count, len(pool))):
        gains = measured.gain(costs, means, deviations)
        best = int(gains.argmax())
        if not found:
            first = float(gains[best])
        if gains[best] <= 0:
            break
        found.append(pool[best])
        measured = measured.and_one(costs[best], means[best])
        deviations[best] = 0.0
    return found, first


def _candidates(
    surrogate: Surrogate, cost: Floats, limit: float, frontier: NDArray[np.int64], generator: np.random.Generator
) -> Sequence[Choice]:
    smallest = cost.min(axis=1).sum()
    levels = np.linspace(smallest, limit, LEVELS) * (1 + 1e-9)
    tables = [surrogate.table, *(surrogate.draw(generator) for _ in range(DRAWS))]
    drawn = [
        solution.choice
        for table in tables
        for solution in knapsack.frontier(table, cost, levels, prove=False)
        if solution.choice is not None
    ]
    open_ = np.argwhere(np.isfinite(cost))
    swaps = []
    for at in generator.integers(0, len(frontier) * len(open_), SWAPS) if len(frontier) else ():
        choice = frontier[at // len(open_)].copy()
        unit, scheme = open_[at % len(open_)]
        choice[unit] = scheme
        swaps.append(choice)
    return [*drawn, *swaps]


def _normal_cdf(z: Floats) -> Floats:
    return 0.5 * (1 + np.array(np.frompyfunc(erf, 1, 1)(z / sqrt(2)), dtype=float))
