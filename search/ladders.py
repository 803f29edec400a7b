"""Layers between two schemes: the mixtures of a layer's groups of output channels, from the cheapest to the dearest.

Which groups of a layer take more bits first, its predictions say; how far each layer is to go, the gradient of the loss
at the rounded model says much better. Along these ladders it is asked for a layer's sum, in which the noise of single
groups averages out, and steps may be so small that the sum over all layers comes true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from search.budget import TOLERANCE
from search.expansion import Expansion
from search.knapsack import relax
from search.sweep import Choice, Sweep, thinned

Floats = NDArray[np.float64]

REACHES = (1 / 40, 1 / 20, 1 / 10, 1 / 5)
"""Of what lies between a layer's cheapest and dearest mixture: how far it may go at once."""

MOST_RUNGS = 128
"""Of a layer: three within the shortest reach."""


@dataclass(frozen=True, slots=True)
class Ladders:
    """For every layer its groups (`units`), and the mixtures of their schemes that lose least by the predictions, each
    at what it costs (`rungs`: mixtures × groups)."""

    units: Sequence[NDArray[np.int64]]
    rungs: Sequence[NDArray[np.int64]]

    @classmethod
    def of(cls, table: Floats, cost: Floats, layer_of: NDArray[np.int64]) -> Ladders:
        """By the predictions of a metric, or several, and the costs, units × schemes; `layer_of` numbers each unit's
        layer. Of every layer the breakpoints of its own relaxed knapsack, which are wholes; of many some, evenly."""
        units = [np.flatnonzero(layer_of == layer) for layer in range(int(layer_of.max()) + 1)]
        relaxed = [relax(table[of], cost[of]) for of in units]
        places = [thinned(range(len(one.costs)), MOST_RUNGS) for one in relaxed]
        return cls(units, [np.array([one.choice(k) for k in at]) for one, at in zip(relaxed, places, strict=True)])

    def neighbours(self, near: Expansion, sweep: Sweep, level: float) -> list[tuple[Choice, float]]:
        """The choices within `level` that add least to the loss where every layer moves along its ladder so far and no
        farther, or to the next rung; each once, and what it adds, which is less than nothing."""
        places = [np.vstack([near.choice[of], rungs]) for of, rungs in zip(self.units, self.rungs, strict=True)]
        tied = replace(
            sweep,
            costs={name: replace(cost, table=self._sums(cost.table, places)) for name, cost in sweep.costs.items()},
        )
        along = Expansion(
            np.zeros(len(places), dtype=np.int64),
            np.array([self._sums(fold, places) for fold in near.first]),
            self._sums(near.second, places),
        )
        found: dict[bytes, tuple[Choice, float]] = {}
        for reach in REACHES:
            changes = np.where(_within(tied.costs[sweep.axis].table, reach), along.changes, np.inf)
            for moved in tied.frontier(changes - changes.min(axis=1, keepdims=True), np.array([level])):
                choice = near.choice.copy()
                for of, place, rung in zip(self.units, places, moved, strict=True):
                    choice[of] = place[rung]
                if (adds := along.change(moved)) < 0:
                    found.setdefault(choice.tobytes(), (choice, adds))
        return list(found.values())

    def _sums(self, table: Floats, places: Sequence[NDArray[np.int64]]) -> Floats:
        """Layers × places: the sum over a layer's groups, inf beyond its last place."""
        sums = np.full((len(places), max(map(len, places))), np.inf)
        for row, (of, place) in enumerate(zip(self.units, places, strict=True)):
            sums[row, : len(place)] = table[of, place].sum(axis=1)
        return sums


def _within(costs: Floats, reach: float) -> NDArray[np.bool_]:
    """Which places are within reach of a layer's first, or the next below it or above it; layers × places of costs."""
    away = np.where(np.isclose(costs, costs[:, :1], rtol=TOLERANCE, atol=0), 0.0, costs - costs[:, :1])
    finite = np.isfinite(costs)
    span = np.where(finite, costs, -np.inf).max(axis=1) - costs.min(axis=1)
    above = np.where(away > 0, away, np.inf).min(axis=1)
    below = np.where(finite & (away < 0), away, -np.inf).max(axis=1)
    farthest, nearest = np.maximum(reach * span, above), np.minimum(-reach * span, below)
    # Infinite where there is no next one: then nothing lies beyond it either.
    within: NDArray[np.bool_] = finite & (away <= farthest[:, None]) & (away >= nearest[:, None])
    return within
