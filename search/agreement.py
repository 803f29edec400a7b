"""How well predictions rank what was measured: Spearman's ρ and Kendall's τ-b, also within bands, with intervals.

Both are written for points that count several times, cᵢ being how often point i does: that is what a bootstrap's
resample is (Efron, 1979), and all resamples are then a few matrix products.

    ρ = the correlation of the midranks Σⱼ cⱼ[xⱼ < xᵢ] + (Σⱼ cⱼ[xⱼ = xᵢ] + 1) / 2
    τ-b = cᵀ(Sx∘Sy)c / √(cᵀ|Sx|c · cᵀ|Sy|c),  Sx = sign(xᵢ − xⱼ)                          (Kendall, 1945)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

Statistic = Callable[[Array, Array, Array], Array]
"""(x, y: points; counts: resamples × points) → one number for each resample, nan where x or y does not vary."""

FEWEST = 3
"""Points of which a rank correlation says anything."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A rank correlation, and the bounds between which 95 % of the bootstrap's resamples lie."""

    value: float
    low: float
    high: float


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three points, or when either does not vary."""
    return _once(spearman_rho, predicted, measured)


def kendall(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Kendall's τ-b; None for fewer than three points, or when either does not vary."""
    return _once(kendall_tau, predicted, measured)


def within_bands(
    statistic: Statistic,
    predicted: ArrayLike,
    measured: ArrayLike,
    bands: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Agreement | None:
    """The mean of a statistic over the bands in which it is defined; None when there is no such band.

    `bands` labels each point: what differs between bands, their size above all, then explains nothing. The interval is
    the percentile bootstrap's over the points of each band; the same seed draws the same resamples, so that predictors
    are compared on equal terms.
    """
    x, y, labels = np.asarray(predicted, float), np.asarray(measured, float), np.asarray(bands)
    generator = np.random.default_rng(seed)
    values, spreads = [], []
    for label in np.unique(labels):
        chosen = labels == label
        count = int(chosen.sum())
        counts = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
        value = statistic(x[chosen], y[chosen], np.ones((1, count)))[0]
        if count >= FEWEST and np.isfinite(value):
            values.append(value)
            spread = statistic(x[chosen], y[chosen], counts)
            # Of a resample in which all points tie nothing is known but the value itself.
            spreads.append(np.where(np.isfinite(spread), spread, value))
    if not values:
        return None
    low, high = np.quantile(np.mean(spreads, axis=0), [0.025, 0.975])
    return Agreement(float(np.mean(values)), float(low), float(high))


def spearman_rho(x: Array, y: Array, counts: Array) -> Array:
    """Spearman's ρ of every resample."""
    dx, dy = (_centred(_midranks(values, counts), counts) for values in (x, y))
    return _ratio((counts * dx * dy).sum(1), (counts * dx * dx).sum(1), (counts * dy * dy).sum(1))


def kendall_tau(x: Array, y: Array, counts: Array) -> Array:
    """Kendall's τ-b of every resample."""
    sx, sy = (np.sign(values[:, None] - values[None, :]) for values in (x, y))
    concordant, told_by_x, told_by_y = (
        ((counts @ pairs) * counts).sum(1) for pairs in (sx * sy, np.abs(sx), np.abs(sy))
    )
    return _ratio(concordant, told_by_x, told_by_y)


def _once(statistic: Statistic, predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    if len(predicted) < FEWEST:
        return None
    value = statistic(np.asarray(predicted, float), np.asarray(measured, float), np.ones((1, len(predicted))))[0]
    return float(value) if np.isfinite(value) else None


def _midranks(values: Array, counts: Array) -> Array:
    """Resamples × points."""
    below = (values[:, None] < values[None, :]).astype(float)
    equal = (values[:, None] == values[None, :]).astype(float)
    ranks: Array = counts @ below + (counts @ equal + 1) / 2
    return ranks


def _centred(ranks: Array, counts: Array) -> Array:
    centred: Array = ranks - ((counts * ranks).sum(1) / counts.sum(1))[:, None]
    return centred


def _ratio(product: Array, x: Array, y: Array) -> Array:
    """product / √(x·y), nan where x or y is 0."""
    varies = (x > 0) & (y > 0)
    ratio: Array = np.where(varies, np.clip(product / np.sqrt(np.where(varies, x * y, 1.0)), -1, 1), np.nan)
    return ratio
