"""Predictions corrected by measurements.

Proxies are right about how layers compare and wrong about how precisions compare: a second-order prediction that is
exact at 6 bits sees a fraction of what 2 bits do. The uniform baselines are measured anyway, and say by how much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def scheme_factors(
    predicted: NDArray[np.float64], uniform: Sequence[tuple[int, NDArray[np.int64], float]]
) -> NDArray[np.float64]:
    """A factor for each scheme that makes the prediction of its uniform configuration what was measured.

    `predicted` is units × schemes; `uniform` holds (scheme index, choice, measured loss). Schemes without a uniform
    measurement, or with nothing predicted or lost, keep 1.
    """
    factors = np.ones(predicted.shape[1])
    for column, choice, loss in uniform:
        total = predicted[np.arange(len(choice)), choice].sum()
        if np.isfinite(total) and total > 0 and loss > 0:
            factors[column] = loss / total
    return factors
