"""Measure configurations on a part of the data first, and go on only with those that may still stand on the frontier.

Each runs against the best measured configuration that costs no more, on the same samples: the samples' differences say
within few of them what their means would say only within many (López-Ibáñez et al., 2016, race with paired tests).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]

Measure = Callable[[Sequence[Choice], range], Sequence[Floats]]
"""The loss of every sample in a range of the data's batches, of each configuration."""

SHARES = (0.25, 0.5)
"""Of the batches after which the losers are out."""

FEWEST = 4
"""Samples from which a difference may be told."""

LEAST = 0.01
"""Of the rival's mean: where it lost less than this on the samples that were measured, its ratio says nothing."""

BEATEN = 3.0
"""Standard errors by which a mean difference is lost."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The losses of the samples that were measured (the first ones of the data), and the loss over all samples: where
    not all were measured, as much above the rival's as on those that were."""

    samples: Floats
    loss: float


def race(
    measure: Measure, choices: Sequence[Choice], rivals: Sequence[Floats | None], batch_sizes: Sequence[int]
) -> list[Outcome]:
    """Measure each configuration until its rival (the losses of all its samples; None: it has none) beats it."""
    samples = [np.zeros(0) for _ in choices]

    def run(indices: Sequence[int], batches: range) -> None:
        found = measure([choices[index] for index in indices], batches) if indices else []
        for index, more in zip(indices, found, strict=True):
            samples[index] = np.append(samples[index], more)

    run([index for index, rival in enumerate(rivals) if rival is None], range(len(batch_sizes)))
    racing = [index for index, rival in enumerate(rivals) if rival is not None]
    for start, end in pairwise(stops(len(batch_sizes))):
        run(racing, range(start, end))
        racing = [index for index in racing if not _beaten(samples[index], rivals[index])]
    return [_outcome(own, rival, sum(batch_sizes)) for own, rival in zip(samples, rivals, strict=True)]


def charged(outcome: Outcome, batch_sizes: Sequence[int]) -> float:
    """The share of the data that was measured."""
    done = [0, *accumulate(batch_sizes)]
    return done[done.index(len(outcome.samples))] / done[-1]


def stops(batches: int) -> list[int]:
    """The numbers of batches, of so many, after which a race pauses; from 0 to all."""
    return sorted({0, *(ceil(share * batches) for share in SHARES), batches})


def _beaten(own: Floats, rival: Floats | None) -> bool:
    if rival is None or len(own) < FEWEST:
        return False
    behind = own - rival[: len(own)]
    return bool(behind.mean() > BEATEN * behind.std(ddof=1) / sqrt(len(behind)))


def _outcome(own: Floats, rival: Floats | None, count: int) -> Outcome:
    """What is below zero is rounding."""
    loss = float(own.mean())
    if rival is not None and len(own) < count:
        on_these = float(rival[: len(own)].mean())
        told = on_these > LEAST * rival.mean()
        loss = float(rival.mean()) * loss / on_these if told else float(rival.mean()) + loss - on_these
    return Outcome(own, max(0.0, loss))
