"""Several budgets: a price for each, the bound that the prices prove, and an allocation near it.

    bound(μ) = Σ_u min_s (loss_us + Σ_b μ_b·cost_bus) − Σ_b μ_b·capacity_b  ≤  the least loss within all capacities

for all prices μ ≥ 0 (Everett 1963; the best one is the linear relaxation's). The bound is concave with kinks; with the
minimum smoothed at a temperature T, −T·log Σ_s exp(−·/T), it has a gradient and a Hessian, and Newton's method finds
its top; T then falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]

TEMPERATURES = 12
COOLING = 0.2
NEWTON_STEPS = 6
HIGHEST = 1e6
"""Times all that may be lost, for all that may be spent: no price is higher."""

SMALLEST_STEP = 1e-4

MOST_SWITCHES = 2000
"""Of single units, that repair or fill an allocation."""

DRAWS = 16
NEAR = 0.002
"""So many prices are tried, off by so much of themselves."""

MOST_PAIRS = 64
CHEAPEST = 400
"""Switches of two units at once that improve an allocation, and among how many single ones they are sought."""


@dataclass(frozen=True, slots=True)
class Pricing:
    """A price for each budget, in losses per unit of its cost; the `bound`; and what each choice loses above the least
    of its unit at these prices (`reduced`, units × schemes, inf where closed): no allocation that takes it loses less
    than bound + reduced.
    """

    prices: Floats
    bound: float
    reduced: Floats


def price(loss: Floats, costs: Floats, capacities: Floats) -> Pricing:
    """The best prices found. `loss` is units × schemes, inf where closed; `costs` are budgets × units × schemes."""
    open_ = np.isfinite(loss)
    least = np.where(open_, costs, np.inf).min(axis=2, keepdims=True)
    extra = np.where(open_, costs - least, 0.0)
    # In units of what the costs can differ by.
    scales = extra.max(axis=2).sum(axis=1)
    scales[scales == 0] = 1.0
    extra, room = extra / scales[:, None, None], (capacities - least.sum(axis=(1, 2))) / scales

    spread = float((np.where(open_, loss, -np.inf).max(axis=1) - loss.min(axis=1)).mean()) or 1.0
    # Where the budgets cannot be met, the bound grows with the prices for ever.
    highest = HIGHEST * spread * len(loss)
    best = at = np.zeros(len(capacities))
    bound = _bound(loss, extra, room, at)
    for temperature in spread * COOLING ** np.arange(TEMPERATURES):
        at = _newton(loss, extra, room, at, temperature, highest)
        if (found := _bound(loss, extra, room, at)) > bound:
            best, bound = at, found
    priced = loss + np.tensordot(best, extra, 1)
    return Pricing(best / scales, bound, priced - priced.min(axis=1, keepdims=True))


def allocate(pricing: Pricing, loss: Floats, costs: Floats, capacities: Floats) -> Choice | None:
    """The best allocation found within all capacities: what the prices, and others near them, choose, repaired where it
    exceeds some and filled up where that leaves room. None where repairing always gets stuck, which proves nothing."""
    generator, rows = np.random.default_rng(0), np.arange(len(loss))
    best, least = None, np.inf
    priced = np.where(np.isfinite(pricing.reduced), costs, 0.0)
    for draw in range(DRAWS):
        away = 0.0 if draw == 0 else NEAR * generator.normal(size=len(capacities))
        reduced = pricing.reduced + np.tensordot(pricing.prices * away, priced, 1)
        choice = _repaired(reduced.argmin(axis=1), pricing, costs, capacities)
        if choice is None:
            continue
        choice = _paired(pricing, filled(choice, loss, costs, capacities), loss, costs, capacities)
        total = float(loss[rows, choice].sum())
        if total < least:
            best, least = choice, total
    return best


def _repaired(choice: Choice, pricing: Pricing, costs: Floats, capacities: Floats) -> Choice | None:
    """Switch one unit after the other, the one that pays least for what it relieves, until all capacities are kept."""
    rows = np.arange(len(choice))
    scales = np.maximum(np.abs(capacities), 1e-300)
    for _ in range(MOST_SWITCHES):
        excess = (costs[:, rows, choice].sum(axis=1) - capacities) / scales
        if (excess <= 0).all():
            return choice
        change = (costs - costs[:, rows, choice][:, :, None]) / scales[:, None, None]
        relief = excess.clip(min=0).sum() - (excess[:, None, None] + change).clip(min=0).sum(axis=0)
        paid = pricing.reduced - pricing.reduced[rows, choice][:, None]
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
    rows = np.arange(len(choice))
    room = capacities - costs[:, rows, choice].sum(axis=1)
    for _ in range(MOST_SWITCHES):
        extra = costs - costs[:, rows, choice][:, :, None]
        saved = np.where((extra <= room[:, None, None]).all(axis=0), loss[rows, choice][:, None] - loss, -np.inf)
        unit, scheme = np.unravel_index(saved.argmax(), saved.shape)
        if not saved[unit, scheme] > 0:
            break
        room = room - extra[:, unit, scheme]
        choice[unit] = scheme
    return choice


def _paired(pricing: Pricing, choice: Choice, loss: Floats, costs: Floats, capacities: Floats) -> Choice:
    """Switch two units at once, each time the pair that saves most, while any does; of the cheapest at these prices."""
    rows = np.arange(len(choice))
    for _ in range(MOST_PAIRS):
        paid = pricing.reduced - pricing.reduced[rows, choice][:, None]
        paid[rows, choice] = np.inf
        cheapest = np.argsort(paid, axis=None)[:CHEAPEST]
        units, schemes = np.unravel_index(cheapest[np.isfinite(paid.ravel()[cheapest])], paid.shape)
        saved = loss[units, choice[units]] - loss[units, schemes]
        extra = costs[:, units, schemes] - costs[:, units, choice[units]]
        room = capacities - costs[:, rows, choice].sum(axis=1)
        fits = (extra[:, :, None] + extra[:, None, :] <= room[:, None, None]).all(axis=0)
        fits &= units[:, None] != units
        gains = np.where(fits, saved[:, None] + saved, 0.0)
        first, second = np.unravel_index(gains.argmax(), gains.shape) if gains.size else (0, 0)
        if not gains.size or not gains[first, second] > 0:
            break
        choice[units[first]], choice[units[second]] = schemes[first], schemes[second]
    return choice


def _bound(loss: Floats, extra: Floats, room: Floats, prices: Floats) -> float:
    return float((loss + np.tensordot(prices, extra, 1)).min(axis=1).sum() - prices @ room)


def _newton(loss: Floats, extra: Floats, room: Floats, prices: Floats, temperature: float, highest: float) -> Floats:
    """Towards the top of the smoothed bound, on prices from 0 to `highest`."""
    for _ in range(NEWTON_STEPS):
        value, slope, curvature = _smoothed(loss, extra, room, prices, temperature)
        free = (prices > 0) | (slope > 0)
        if not free.any() or np.abs(slope[free]).max() < 1e-9:
            break
        square = curvature[np.ix_(free, free)]
        step = np.zeros(len(prices))
        ridge = max(1e-9 * float(np.trace(square)), 1e-12 / temperature)
        step[free] = np.linalg.solve(square + ridge * np.eye(len(square)), slope[free])
        length = 1.0
        while length > SMALLEST_STEP:
            ahead = (prices + length * step).clip(0, highest)
            if _smoothed(loss, extra, room, ahead, temperature)[0] >= value:
                break
            length *= 0.3
        else:
            break
        prices = ahead
    return prices


def _smoothed(
    loss: Floats, extra: Floats, room: Floats, prices: Floats, temperature: float
) -> tuple[float, Floats, Floats]:
    """The smoothed bound, its gradient, and minus its Hessian."""
    priced = loss + np.tensordot(prices, extra, 1)
    least = priced.min(axis=1, keepdims=True)
    weights = np.exp((least - priced) / temperature)
    totals = weights.sum(axis=1, keepdims=True)
    weights /= totals
    value = float(least.sum() - temperature * np.log(totals).sum() - prices @ room)
    means = (weights * extra).sum(axis=2)
    second = np.einsum("us,bus,cus->bc", weights, extra, extra, optimize=True)
    return value, means.sum(axis=1) - room, (second - means @ means.T) / temperature
