"""How far off the mean loss over samples may be, where samples come from few documents."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]


def margin(losses: Floats, beside: Floats, documents: Sequence[int], level: float) -> float:
    """How far the ratio of the mean losses of two configurations may be off by what their samples are, to either side
    and relative to it, at a confidence `level`; 0 where there is nothing to tell it from. With ones `beside`, that of
    the mean loss itself.

    Samples of one document are alike, so that a mean of few documents is further off than its samples let expect: the
    jackknife leaves out one document after the other (Efron and Stein 1981), and what few of them tell is widened by
    Student's t with as many degrees of freedom as documents of one size would have (Kish 1965). Of a single document,
    its samples.
    """
    _, of = np.unique(documents if len(set(documents)) > 1 else np.arange(len(losses)), return_inverse=True)
    sizes, rest = np.bincount(of), beside.sum() - np.bincount(of, weights=beside)
    if len(sizes) < 2 or losses.sum() <= 0 or rest.min() <= 0:
        return 0.0
    ratio, without = losses.sum() / beside.sum(), (losses.sum() - np.bincount(of, weights=losses)) / rest
    error = sqrt((1 - 1 / len(sizes)) * ((without - without.mean()) ** 2).sum())
    freedom = max(len(losses) ** 2 / (sizes**2).sum() - 1, 1.0)
    return float(stdtrit(freedom, (1 + level) / 2) * error / ratio)
