"""Several budgets: a price for each, the bound that the prices prove, and an allocation near it.

    bound(μ) = Σ_u min_s (loss_us + Σ_b μ_b·cost_bus) − Σ_b μ_b·capacity_b  ≤  the least loss within all capacities

for all prices μ ≥ 0 (Everett 1963; the best one is the linear relaxation's). The bound is concave with kinks; with the
minimum smoothed at a temperature T, −T·log Σ_s exp(−·/T), it has a gradient and a Hessian, and Newton's method finds
its top; T then falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from search.switches import Choice, Floats, filled, paired, repaired

TEMPERATURES = 12
COOLING = 0.2
NEWTON_STEPS = 6
HIGHEST = 1e6
"""Times all that may be lost, for all that may be spent: no price is higher."""

ROUNDING = 1e-6
"""Of all that may be lost: by more than this, no bound is wrong."""

SMALLEST_STEP = 1e-10
"""Of the first tried: so far a step is shortened until the bound rises."""

DRAWS = 16
NEAR = 0.002
"""So many prices are tried at most, off by so much of themselves."""


@dataclass(frozen=True, slots=True)
class Pricing:
    """A price for each budget, in losses per unit of its cost; the `bound`; and what each choice loses above the least
    of its unit at these prices (`reduced`, units × schemes, inf where closed): no allocation that takes it loses less
    than bound + reduced. `infeasible` where that is more than any allocation loses, so that none keeps the budgets.
    """

    prices: Floats
    bound: float
    reduced: Floats
    infeasible: bool


def price(loss: Floats, costs: Floats, capacities: Floats) -> Pricing:
    """The best prices found. `loss` is units × schemes, inf where closed; `costs` are budgets × units × schemes."""
    open_ = np.isfinite(loss)
    least = np.where(open_, costs, np.inf).min(axis=2, keepdims=True)
    extra = np.where(open_, costs - least, 0.0)
    # In units of what the costs can differ by.
    scales = extra.max(axis=2).sum(axis=1)
    scales[scales == 0] = 1.0
    extra, room = extra / scales[:, None, None], (capacities - least.sum(axis=(1, 2))) / scales

    worst = np.where(open_, loss, -np.inf).max(axis=1)
    spread = float((worst - loss.min(axis=1)).mean()) or 1.0
    # Where fractions of schemes cannot meet the budgets either, the bound grows with the prices for ever.
    highest = HIGHEST * spread * len(loss)
    beyond = worst.sum() + ROUNDING * (np.abs(worst).sum() + spread * len(loss))
    best = at = np.zeros(len(capacities))
    bound = _bound(loss, extra, room, at)
    for temperature in spread * COOLING ** np.arange(TEMPERATURES):
        at = _newton(loss, extra, room, at, temperature, highest)
        if (found := _bound(loss, extra, room, at)) > bound:
            best, bound = at, found
        if bound > beyond:
            break
    priced = loss + np.tensordot(best, extra, 1)
    return Pricing(best / scales, bound, priced - priced.min(axis=1, keepdims=True), bool(bound > beyond))


def allocate(pricing: Pricing, loss: Floats, costs: Floats, capacities: Floats) -> Choice | None:
    """An allocation within all capacities: what the prices choose, repaired where it exceeds some and improved where
    that leaves room. Where repairing gets stuck, what other prices near them choose; None where it always does, which
    proves nothing."""
    generator = np.random.default_rng(0)
    priced = np.where(np.isfinite(pricing.reduced), costs, 0.0)
    for draw in range(DRAWS):
        away = 0.0 if draw == 0 else NEAR * generator.normal(size=len(capacities))
        reduced = pricing.reduced + np.tensordot(pricing.prices * away, priced, 1)
        choice = repaired(reduced.argmin(axis=1), pricing.reduced, costs, capacities)
        if choice is not None:
            choice = filled(choice, loss, costs, capacities)
            return paired(choice, pricing.reduced, loss, costs, capacities)
    return None


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
        # Where the bound is nearly flat, the whole step would lead to prices beyond all sense.
        longest = prices.max() + highest / HIGHEST
        step *= min(1.0, longest / max(np.abs(step).max(), 1e-300))
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
