"""How far off a mean loss over samples may be, where samples come from few documents."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]


def margin(shares: Floats, beside: Floats, documents: Sequence[int], level: float) -> float:
    """How far the logarithm of the ratio of two mean losses may be off by what their samples are, to either side, at a
    confidence `level`: each is given as the shares that its samples have in the sum of all. With equal shares `beside`,
    that of one mean loss.

    Samples of one document are alike, so that a mean of few documents is further off than its samples let expect: the
    jackknife leaves out one document after the other (Efron and Stein 1981), linearised in the ratio, and what few of
    them tell is widened by Student's t, of as many as they count for where they are unequal (Kish 1965). One document
    stands for its samples. 0 where there is nothing to tell it from.
    """
    _, of = np.unique(documents if len(set(documents)) > 1 else np.arange(len(shares)), return_inverse=True)
    sizes = np.bincount(of)
    if len(sizes) < 2:
        return 0.0
    without = np.bincount(of, weights=beside - shares) / (1 - sizes / len(shares))
    error = sqrt((1 - 1 / len(sizes)) * (without**2).sum())
    freedom = max(len(shares) ** 2 / (sizes**2).sum() - 1, 1.0)
    return float(stdtrit(freedom, (1 + level) / 2) * error)
