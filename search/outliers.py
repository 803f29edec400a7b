"""Which values stand out above the others: the modified z-score (Iglewicz and Hoaglin, 1993), on a log scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FENCE = 3.5
"""So many times the spread above the median a value stands out."""

SPREAD = 1.4826
"""What the median absolute deviation is multiplied by to be the standard deviation of normal values."""

FEWEST = 8
"""Of fewer values, none is said to stand out."""


def stand_out(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the values whose size stands out: log |v| more than `FENCE` × `SPREAD` × MAD above the median.

    Zeros and NaN say nothing. Where more than half of the sizes are equal, the spread is zero and none stands out.
    """
    found = np.zeros(len(values), dtype=bool)
    told = np.isfinite(values) & (values != 0)
    if told.sum() < FEWEST:
        return found
    sizes = np.log(np.abs(values[told]))
    above = sizes - np.median(sizes)
    spread = SPREAD * np.median(np.abs(above))
    found[told] = above > FENCE * spread if spread > 0 else False
    return found


def times_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each |v| ÷ the median of the sizes that are not zero; NaN where there is none."""
    told = np.isfinite(values) & (values != 0)
    middle = np.median(np.abs(values[told])) if told.any() else np.nan
    return np.asarray(np.abs(values) / middle)
