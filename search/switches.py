"""An allocation improved by switching units, one or two at a time, within all capacities.

`loss` is units × schemes, inf where closed; `costs` are budgets × units × schemes; `reduced` says what each choice
loses above the least of its unit at some prices of the budgets (`lagrangian.Pricing`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]
"""A scheme index for every unit."""

MOST_SWITCHES = 2000
"""Of single units, that repair or fill an allocation."""

MOST_PAIRS = 64
CHEAPEST = 400
"""Switches of two units at once that improve an allocation, and among how many single ones they are sought."""


def repaired(choice: Choice, reduced: Floats, costs: Floats, capacities: Floats) -> Choice | None:
    """Switch one unit after the other, the one that pays least for what it relieves, until all capacities are kept.

    None where no switch relieves any more, which proves nothing.
    """
    choice, rows = choice.copy(), np.arange(len(choice))
    scales = np.maximum(np.abs(capacities), 1e-300)
    for _ in range(MOST_SWITCHES):
        excess = (costs[:, rows, choice].sum(axis=1) - capacities) / scales
        if (excess <= 0).all():
            return choice
        change = (costs - costs[:, rows, choice][:, :, None]) / scales[:, None, None]
        relief = excess.clip(min=0).sum() - (excess[:, None, None] + change).clip(min=0).sum(axis=0)
        paid = reduced - reduced[rows, choice][:, None]
        helps = (relief > 0) & np.isfinite(paid)
        if not helps.any():
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(helps, np.maximum(paid, 0) / relief, np.inf)
        # Of those that cost nothing, the one that relieves most.
        unit, scheme = np.unravel_index(np.lexsort((-relief.ravel(), ratio.ravel()))[0], ratio.shape)
        choice[unit] = scheme
    return None


def filled(choice: Choice, loss: Floats, costs: Floats, capacities: Floats) -> Choice:
    """Switch one unit after the other, each time the one that saves most of those that fit, while any does."""
    choice, rows = choice.copy(), np.arange(len(choice))
    room = capacities - costs[:, rows, choice].sum(axis=1)
    for _ in range(MOST_SWITCHES):
        extra = costs - costs[:, rows, choice][:, :, None]
        saved = np.where((extra <= room[:, None, None]).all(axis=0), loss[rows, choice][:, None] - loss, -np.inf)
        if not saved.max(initial=-np.inf) > 0:
            break
        unit, scheme = np.unravel_index(saved.argmax(), saved.shape)
        room = room - extra[:, unit, scheme]
        choice[unit] = scheme
    return choice


def paired(choice: Choice, reduced: Floats, loss: Floats, costs: Floats, capacities: Floats) -> Choice:
    """Switch two units at once, each time the pair that saves most, while any does; of the cheapest at the prices."""
    choice, rows = choice.copy(), np.arange(len(choice))
    for _ in range(MOST_PAIRS):
        paid = reduced - reduced[rows, choice][:, None]
        paid[rows, choice] = np.inf
        cheapest = np.argsort(paid, axis=None)[:CHEAPEST]
        units, schemes = np.unravel_index(cheapest[np.isfinite(paid.ravel()[cheapest])], paid.shape)
        saved = loss[units, choice[units]] - loss[units, schemes]
        extra = costs[:, units, schemes] - costs[:, units, choice[units]]
        room = capacities - costs[:, rows, choice].sum(axis=1)
        fits = (extra[:, :, None] + extra[:, None, :] <= room[:, None, None]).all(axis=0)
        fits &= units[:, None] != units
        gains = np.where(fits, saved[:, None] + saved, 0.0)
        if not gains.max(initial=0.0) > 0:
            break
        first, second = np.unravel_index(gains.argmax(), gains.shape)
        choice[units[first]], choice[units[second]] = schemes[first], schemes[second]
    return choice
