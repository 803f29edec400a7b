"""Dominance: which candidates no other one betters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def undominated(objectives: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the rows of a points × objectives array (all minimised) that no other row dominates.

    A row dominates another when it is nowhere greater and somewhere smaller. Of equal rows the first stays; a row with
    a NaN never does.
    """
    keep: NDArray[np.bool_] = np.asarray(~np.isnan(objectives).any(axis=1))
    for row in np.flatnonzero(keep):
        point = objectives[row]
        no_greater = (objectives <= point).all(axis=1) & keep
        smaller = no_greater & (objectives < point).any(axis=1)
        equal_before = no_greater & (objectives == point).all(axis=1) & (np.arange(len(objectives)) < row)
        keep[row] = not (smaller | equal_before).any()
    return keep
