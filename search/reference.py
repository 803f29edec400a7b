"""What no allocation can do better: by the predictions, and by rate–distortion theory.

The linear relaxation bounds what any allocation of the schemes is predicted to lose. An ideal quantizer, not bound to
any scheme, loses a_u·2^(−2·b_u) at b_u bits per weight of unit u, a_u being its loss per relative squared error of the
weights (Gaussian weights at the rate–distortion function, Cover & Thomas, Elements of Information Theory, §10.3); how
many bits each unit gets is then reverse water-filling (as in BAQ, 2506.05664, and Q-Palette, 2509.20214):

    min Σ_u a_u·2^(−2·b_u)   such that   Σ_u n_u·b_u ≤ bits, b_u ≥ 0
        ⟹   b_u = max(0, ½·log₂(2·ln 2·a_u / (λ·n_u)))
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search import ilp
from search.budget import Bound
from search.cost import Cost, Resource, proportion, stored_bits
from search.space import Space
from search.surrogate import Surrogate
from search.sweep import Sweep

Floats = NDArray[np.float64]

SECONDS = 1.0
"""Of the integer program of a level, where prices alone find no allocation: its bound is known by then."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Losses at totals of `axis` of at most each of `levels` (in the units of the cost tables): below `lower_bound` no
    allocation within all budgets is predicted, below `rate_distortion` none of an ideal quantizer whatever the other
    budgets; the latter is None where activations are rounded, or the axis does not count stored bits."""

    axis: Resource
    levels: list[float]
    lower_bound: list[float]
    rate_distortion: list[float] | None


def reference(surrogate: Surrogate, sweep: Sweep, space: Space, relative_errors: Floats | None) -> Reference:
    """Of predictions as the measurements corrected them; `relative_errors` of the weights (units × schemes, NaN where a
    scheme does not round them) are None where activations are rounded too.

    Levels that no allocation keeps are left out.
    """
    bounds = lower_bounds(surrogate.table, sweep)
    kept = np.isfinite(bounds)
    levels = sweep.levels[kept]
    ideal = None if relative_errors is None else ideal_losses(surrogate.table, relative_errors, sweep, space, levels)
    return Reference(
        sweep.axis,
        levels.tolist(),
        _raised(bounds[kept], surrogate.power),
        None if ideal is None else _raised(ideal, surrogate.power),
    )


def lower_bounds(loss: Floats, sweep: Sweep) -> Floats:
    """What any allocation within all budgets is predicted to lose at least (`loss` is units × schemes), at every level;
    NaN where there is none."""
    own = [Bound(sweep.axis, sweep.axis, float(level)) for level in sweep.levels]
    found = [ilp.solve(loss, sweep.costs, [level, *sweep.bounds], prove=False, time_limit=SECONDS) for level in own]
    return np.array([solution.bound for solution in found])


def ideal_losses(loss: Floats, relative_errors: Floats, sweep: Sweep, space: Space, levels: Floats) -> Floats | None:
    """What an ideal quantizer would lose at each level; None where the axis does not count stored bits.

    Units that no scheme rounds, or whose rounding loses nothing, keep what they store at least.
    """
    stored = Cost("stored_bits", np.where(space.allowed, stored_bits(space), np.inf), 0.0)
    axis = sweep.costs[sweep.axis]
    bits_each = proportion(axis, stored)
    if bits_each is None:
        return None
    sensitivities = loss_per_error(loss, relative_errors)
    told = sensitivities > 0
    kept = stored.table[~told].min(axis=1).sum()
    weights = np.array([unit.weights for unit in space.units], dtype=float)[told]
    losses = []
    for level in levels:
        bits = water_filling(sensitivities[told], weights, (level - axis.constant) * bits_each - kept)
        losses.append(float((sensitivities[told] * 2 ** (-2 * bits)).sum()))
    return np.array(losses)


def loss_per_error(loss: Floats, relative_errors: Floats) -> Floats:
    """a_u: the loss of every unit per relative squared rounding error of its weights, both units × schemes; 0 where no
    scheme has both.

    The median over schemes: the corrected predictions of one scheme may be far off.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where((loss > 0) & (relative_errors > 0), loss / relative_errors, np.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        medians: Floats = np.nan_to_num(np.nanmedian(ratios, axis=1), nan=0.0)
    return medians


def water_filling(sensitivities: Floats, weights: Floats, capacity: float) -> Floats:
    """The bits per weight b_u ≥ 0 of least Σ a_u·2^(−2·b_u) with Σ n_u·b_u ≤ capacity; a and n are above 0, and all are
    arrays over units.

    Units below the water level log₂ λ get none. With the k units of the highest a_u/n_u above it, the capacity settles
    the level; the right k is the largest whose last unit is above its own level.
    """
    heights = np.log2(2 * np.log(2) * sensitivities / weights)
    order = np.argsort(-heights, kind="stable")
    ordered, counts = heights[order], weights[order]
    levels = (np.cumsum(counts * ordered) - 2 * max(capacity, 0.0)) / np.cumsum(counts)
    above = np.flatnonzero(ordered >= levels)
    level = levels[above[-1]] if len(above) else np.inf
    bits: Floats = np.maximum(0.0, (heights - level) / 2)
    return bits


def _raised(losses: Floats, power: float) -> list[float]:
    raised: list[float] = (losses.clip(min=0) ** power).tolist()
    return raised
