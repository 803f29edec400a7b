"""The loss near one configuration: how it would change with one unit's scheme, and the best within a few changes.

Sensitivities at full precision say what each unit's rounding costs alone. At a configuration that is already rounded
the gradient of the loss is not 0, and a unit's share of it says how its error falls in with all others' (see
`workers.sensitivity.expansion`). The sum over changed units is true nearby only, so that few may change at once: a
trust region, as in sequential quadratic programming.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from search.metrics import BACKWARD
from search.sweep import Choice, Sweep

Floats = NDArray[np.float64]

FOLDS = 8
"""Of the data, whose spread says how far the gradient can be believed; the curvature is of the first."""

CHARGE = BACKWARD * (1 + 1 / FOLDS)
"""What an expansion costs, in forward passes over the calibration data: evaluations."""

SHARES = (1 / 16, 1 / 8, 1 / 4)
"""Of the units that have a choice: how many may change at once."""

HALVINGS = 20
"""Of the interval of what a change is charged."""


@dataclass(frozen=True)
class Expansion:
    """What each change of one unit of `choice` would add to the loss, by the terms of first order (`first`, folds ×
    units × schemes) and of second order (`second`, units × schemes); inf where a choice is closed."""

    choice: Choice
    first: Floats
    second: Floats

    @cached_property
    def changes(self) -> Floats:
        """Units × schemes, 0 at the choice.

        Terms of first order are shrunk by what their spread leaves of them (m² / (m² + its variance)): the least of
        many is otherwise where the noise is luckiest.
        """
        with np.errstate(invalid="ignore"):
            mean = self.first.mean(axis=0)
            alone = len(self.first) == 1
            variance = np.zeros_like(mean) if alone else self.first.var(axis=0, ddof=1) / len(self.first)
            believed = mean * mean**2 / np.maximum(mean**2 + variance, 1e-300)
        changes: Floats = np.where(np.isfinite(believed), believed, np.inf) + self.second
        changes[np.arange(len(self.choice)), self.choice] = 0.0
        return changes

    def change(self, choice: Choice) -> float:
        """What another choice would add to the loss."""
        return float(self.changes[np.arange(len(choice)), choice].sum())

    def neighbours(self, sweep: Sweep, level: float) -> list[tuple[Choice, float]]:
        """The choices within `level` that add least to the loss with a sixteenth, an eighth and a quarter of the units
        changed, at most; each once, and what it adds, which is less than nothing."""
        free = int((np.isfinite(self.changes).sum(axis=1) > 1).sum())
        found = [self._nearest(sweep, level, max(1, round(share * free))) for share in SHARES]
        each = {one.tobytes(): (one, self.change(one)) for one in found if one is not None}
        return [(one, adds) for one, adds in each.values() if adds < 0]

    def _nearest(self, sweep: Sweep, level: float, most: int) -> Choice | None:
        """With at most so many units changed: each change is charged the least that keeps all others away."""
        changed = np.ones(self.changes.shape, dtype=bool)
        changed[np.arange(len(self.choice)), self.choice] = False
        found, low, high = None, 0.0, float(np.abs(self.changes[np.isfinite(self.changes)]).max())
        charge = 0.0
        for _ in range(HALVINGS):
            charged = self.changes + charge * changed
            near = sweep.frontier(charged - charged.min(axis=1, keepdims=True), np.array([level]))
            if near and (near[0] != self.choice).sum() <= most:
                found, high = near[0], charge
                if charge == 0:
                    break
            else:
                low = charge
            charge = (low + high) / 2
        return found


Expand = Callable[[Choice], Expansion]
"""Computes an expansion at a choice, over the calibration data."""
