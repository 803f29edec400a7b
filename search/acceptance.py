"""Which configurations to believe: a gain on the data that was searched may be a fluke of that data.

On data that the search has not seen, each configuration has to beat what stands already, at no greater cost, in a
paired bootstrap over samples (Efron 1979); else what stands already keeps standing. Uniform configurations stand first,
then what was predicted, then what was found by measuring, after few expansions before many: the more a configuration
was chosen by its measured loss, the more it owes to luck. Among the first two, which were hardly chosen by it, the
searched data are evidence as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from search.budget import TOLERANCE
from search.pareto import best_under
from search.sweep import Choice, Sweep

Floats = NDArray[np.float64]

FOUND = 2
"""The tier of what measuring found; every expansion that led to it adds one."""

RESAMPLES = 2000
CONFIDENCE = 0.9
"""Share of the resamples in which a configuration must have the lesser loss."""


def finalists(sweep: Sweep, choices: Sequence[Choice], losses: Floats, tiers: Sequence[int]) -> list[int]:
    """Which of the measured configurations may be accepted: for every level and tier the one of least loss up to both;
    and all uniform ones."""
    costs, kept = sweep.totals(choices)[:, None], np.array([sweep.admits(choice) for choice in choices])
    chosen = {index for index, tier in enumerate(tiers) if tier == 0}
    for highest in sorted(set(tiers)):
        values = np.where(kept & (np.asarray(tiers) <= highest), losses, np.nan)
        best = [best_under(values, costs, np.array([level * (1 + TOLERANCE)])) for level in sweep.levels]
        chosen |= {index for index in best if index is not None}
    return sorted(chosen)


def better(losses: Floats, others: Floats, *, seed: int = 0) -> float:
    """The share of paired resamples in which the mean of `losses` is less than that of `others` (both: samples).

    Equal means count half.
    """
    differences = np.asarray(losses) - np.asarray(others)
    count = len(differences)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    means = weights @ differences
    return float((means < 0).mean() + (means == 0).mean() / 2)


def accepted(losses: Floats, costs: Floats, tiers: Sequence[int], searched: Sequence[Floats]) -> NDArray[np.bool_]:
    """Which configurations stand, of losses on new data (configurations × samples) and costs (configurations ×
    resources); `searched` are the losses on all the searched data, which tell of tiers below `FOUND`.

    Those of a lower tier stand first, and of one tier the cheaper. One that nothing undercuts stands by itself; of
    those that cost no more in any resource, the one of least loss has to be beaten.
    """
    pooled = [np.append(*both) for both in zip(searched, losses, strict=True)]
    stands = np.zeros(len(losses), dtype=bool)
    for index in np.lexsort((*costs.T[::-1], tiers)):
        told = pooled if tiers[index] < FOUND else losses
        means = np.array([samples.mean() for samples in told])
        rival = best_under(np.where(stands, means, np.nan), costs, costs[index] * (1 + TOLERANCE))
        stands[index] = rival is None or better(told[index], told[rival]) >= CONFIDENCE
    return stands
