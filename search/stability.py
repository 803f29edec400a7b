"""Whether more precise sensitivities would change what is chosen.

At a price λ per bit, unit u takes the scheme argmin_s value_us + λ·bits_us. Every allocation on the lower convex hull
of the frontier is such a choice at some price; when the choices at all prices survive the errors of the values, more
probes are of no use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PRICES = 64
DRAWS = 16
STABLE = 0.02
"""Decisions are stable when no draw changes a greater fraction of them."""

SMALLEST_FACTOR = 1e-6
"""What an error of 50 % or more leaves of a value at two standard errors below: losses are positive."""


def changed_decisions(
    values: NDArray[np.float64], relative_error: NDArray[np.float64], bits: NDArray[np.float64], seed: int = 0
) -> float:
    """The greatest fraction of decisions (units × prices) that changes when every unit is two standard errors off.

    `values` and `bits` are units × schemes, values inf where a scheme is not allowed; `relative_error` is the standard
    error of each unit's values over the values. Each draw moves every unit up or down at random. Units that have no
    choice are not counted.
    """
    open_ = np.isfinite(values).sum(axis=1) > 1
    values, relative_error, bits = values[open_], relative_error[open_], bits[open_]
    prices = _prices(values, bits)
    if not len(prices):
        return 0.0
    decided = decisions(values, bits, prices)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (DRAWS, len(values)))
    factors = np.maximum(1 + 2 * relative_error * signs, SMALLEST_FACTOR)
    return max(float((decisions(values * factor[:, None], bits, prices) != decided).mean()) for factor in factors)


def decisions(values: NDArray[np.float64], bits: NDArray[np.float64], prices: NDArray[np.float64]) -> NDArray[np.int64]:
    """argmin_s value + price·bits, as a scheme index; prices × units."""
    return np.asarray((values + prices[:, None, None] * bits).argmin(axis=-1), dtype=np.int64)


def _prices(values: NDArray[np.float64], bits: NDArray[np.float64]) -> NDArray[np.float64]:
    """A geometric grid over the prices at which some unit is indifferent between two schemes."""
    first, second = np.triu_indices(values.shape[1], k=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        slopes = (values[:, first] - values[:, second]) / (bits[:, second] - bits[:, first])
    slopes = slopes[np.isfinite(slopes) & (slopes > 0)]
    return np.geomspace(slopes.min(), slopes.max(), PRICES) if len(slopes) else slopes
