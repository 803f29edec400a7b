"""What to measure next: the configurations from which the frontier is expected to gain most.

The gain of a measurement is the area that it adds between the frontier and a corner, in cost × log loss (expected
hypervolume improvement, Emmerich et al. 2006). A log loss is expected to be normal, so that the area has a closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, sqrt

import numpy as np
from numpy.typing import NDArray

from search.pareto import hypervolume, undominated
from search.surrogate import Surrogate
from search.sweep import Sweep, thinned

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]

DRAWS = 16
SWAPS = 512
"""What may be measured next: the frontiers of so many draws of the posterior, and as many switches of single units, at
most, from configurations of the measured frontier."""

FEW_DRAWS = 4
FEW_LEVELS = 8
"""The same, and at how many levels, under several budgets: a program of each takes a hundred times as long."""

LOSSLESS = 1e-3
"""Of the least loss that is not 0: what counts for a loss of 0."""

MARGIN = 0.25
"""How far the corner lies beyond the budget, relative to the costs that are swept."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Costs and log losses of measured configurations; beyond the `corner`, (cost, log loss), nothing counts. What
    breaks a bound costs infinitely much."""

    costs: Floats
    logs: Floats
    corner: tuple[float, float]
    height: float = 0.0
    """What the cheapest one within the corner adds to the area, for every unit of cost that it lies below it: a loss
    that is allowed has its point in question, as a budget has."""

    @property
    def frontier(self) -> NDArray[np.int64]:
        """The undominated ones within the corner, from the cheapest; indices."""
        points = np.column_stack([self.costs, self.logs])
        kept = np.flatnonzero(undominated(points) & (points < self.corner).all(axis=1))
        return kept[self.costs[kept].argsort(kind="stable")]

    @property
    def area(self) -> float:
        """What they cover together, up to the corner."""
        return hypervolume(np.column_stack([self.costs, self.logs]), np.array(self.corner))

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
        cheapest = self.costs[frontier].min(initial=self.corner[0])
        fits = _normal_cdf((self.corner[1] - means) / deviations[:, 0])
        gains += self.height * fits * (cheapest - costs).clip(min=0)
        return gains

    def and_one(self, cost: float, log: float) -> Measured:
        """These and one more."""
        return Measured(np.append(self.costs, cost), np.append(self.logs, log), self.corner, self.height)


def propose(
    surrogate: Surrogate,
    sweep: Sweep,
    choices: NDArray[np.int64],
    losses: Floats,
    count: int,
    generator: np.random.Generator,
    most_loss: float = np.inf,
) -> tuple[list[Choice], float]:
    """At most `count` choices to measure next, most gainful first, and the gain of the first, relative to the area that
    the measured ones cover.

    All are within the sweep's bounds and new. `choices` (configurations × units) and `losses` are what is measured; a
    loss above `most_loss` is worth nothing. Each choice is taken as if those before it had given what is expected of
    them.
    """
    seen, told = {choice.tobytes() for choice in choices}, np.asarray(losses) > 0
    if not told.any():
        return [], 0.0
    # What loses nothing cannot be bettered, and has no logarithm: far below everything else stands for it.
    logs = np.log(np.where(told, losses, losses[told].min() * LOSSLESS))
    height = MARGIN * float(np.ptp(logs)) if np.isfinite(most_loss) else 0.0
    costs = np.where([sweep.admits(choice) for choice in choices], sweep.totals(choices), np.inf)
    measured = Measured(costs, logs, _corner(sweep, logs, most_loss), height)
    candidates = {
        choice.tobytes(): choice
        for choice in _candidates(surrogate, sweep, choices[measured.frontier], generator)
        if choice.tobytes() not in seen and sweep.admits(choice)
    }
    if not candidates:
        return [], 0.0
    pool = np.array(list(candidates.values()))
    costs = sweep.totals(pool)
    means, deviations = surrogate.predict(pool)
    covered, first, found = measured.area, 0.0, list[Choice]()
    for _ in range(min(count, len(pool))):
        gains = measured.gain(costs, means, deviations)
        best = int(gains.argmax())
        if not gains[best] > 0:
            break
        first = first or float(gains[best]) / max(covered, float(gains[best]))
        found.append(pool[best])
        measured = measured.and_one(costs[best], means[best])
        deviations[best] = 0.0
    return found, first


def _corner(sweep: Sweep, logs: Floats, most_loss: float) -> tuple[float, float]:
    """Beyond the budget, so that what lies at the budget, and nothing betters, counts as well."""
    smallest = float(sweep.levels[-1])
    beyond = MARGIN * (sweep.limit - smallest) or 1e-9 * max(abs(sweep.limit), 1e-300)
    return sweep.limit + beyond, min(float(logs.max()) + 1e-9, float(np.log(most_loss)))


def _candidates(
    surrogate: Surrogate, sweep: Sweep, frontier: NDArray[np.int64], generator: np.random.Generator
) -> Sequence[Choice]:
    one = len(sweep.bounds) < 2
    draws, levels = (DRAWS, sweep.levels) if one else (FEW_DRAWS, np.array(thinned(list(sweep.levels), FEW_LEVELS)))
    tables = [surrogate.table, *(surrogate.draw(generator) for _ in range(draws))]
    drawn = [choice for table in tables for choice in sweep.frontier(table, levels)]
    open_ = np.argwhere(sweep.open)
    swaps = []
    for at in generator.integers(0, len(frontier) * len(open_), SWAPS) if len(frontier) else ():
        choice = frontier[at // len(open_)].copy()
        unit, scheme = open_[at % len(open_)]
        choice[unit] = scheme
        swaps.append(choice)
    return [*drawn, *swaps]


def _normal_cdf(z: Floats) -> Floats:
    return 0.5 * (1 + np.array(np.frompyfunc(erf, 1, 1)(z / sqrt(2)), dtype=float))
