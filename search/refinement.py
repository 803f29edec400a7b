"""The loop that corrects predictions by measuring: fit, propose what promises most, race it, fit again.

Predictions say where to look, measurements say how far off they are, and what is measured next is what the frontier is
expected to gain most from. In turn with that, the best configuration of a level is expanded: the gradient of the loss
there sees how the layers' errors fall in with one another, and says which few of them to change. It ends when the
evaluations are spent, or when nothing promises to move the frontier any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from search.acceptance import FOUND
from search.budget import TOLERANCE
from search.candidate import Source
from search.expansion import CHARGE, Expand
from search.improvement import propose
from search.ladders import Ladders
from search.racing import Choice, Measure, charged, race
from search.surrogate import Features, Surrogate
from search.sweep import Sweep, thinned

Floats = NDArray[np.float64]

TOGETHER = 4
"""Proposals that are measured before the next fit, at least."""

CALM = 1e-4
"""Of the area under the frontier: what promises less moves nothing."""

DRAWN = 1 / 3
"""Of the first measurements, the share that are drawn at random, so that the errors of the predictions show."""

SHARE = 9
"""A level is expanded if so many evaluations are there for each."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A measured configuration: its loss on the calibration data (`loss`; of the samples where all were measured), and
    what was expected before: mean and standard deviation of its logarithm."""

    choice: Choice
    source: Source
    loss: float
    samples: Floats
    expected: tuple[float, float] | None = None
    expansions: int = 0
    """How many, one after the other, led to it, or to what it was to better."""

    @property
    def tier(self) -> int:
        """How much it may owe to luck: uniform configurations nothing, predicted ones little, those that measuring
        found more, and most those that the gradient of the searched data was followed to again and again."""
        return {"uniform": 0, "ilp": 1}.get(self.source, FOUND + self.expansions)


@dataclass(slots=True)
class Refinement:
    """What is measured so far, and the means to measure more; without `expand`, no configuration is expanded.

    `spent` counts evaluations: one is a configuration measured on all the calibration data, and an expansion is several
    (`search.expansion.CHARGE`).
    """

    sweep: Sweep
    features: Features
    measure: Measure
    batch_sizes: Sequence[int]
    evaluations: int
    seed: int = 0
    most_loss: float = np.inf
    together: int = TOGETHER
    expand: Expand | None = None
    ladders: Ladders | None = None
    """Of groups of channels: along these an expanded configuration moves; without, unit by unit."""
    trials: list[Trial] = field(default_factory=list)
    spent: float = 0.0
    gain: float = np.inf
    """What the best of the last proposals promised, relative to the area under the frontier."""

    @property
    def left(self) -> int:
        """Whole evaluations that are left."""
        return max(0, int(self.evaluations - self.spent + 1e-9))

    def surrogate(self) -> Surrogate:
        """The predictions as all measurements correct them."""
        return Surrogate.fit(self.features, *self._measured())

    def begin(self, uniform: Sequence[Choice]) -> None:
        """Measure what the first fit needs: the baselines, configurations of the predicted frontier, drawn ones."""
        self.whole(uniform, "uniform")
        predicted, drawn = first(self.left)
        self.whole(thinned(self.sweep.frontier(self.surrogate().table), predicted), "ilp")
        self.whole(self.drawn(drawn), "ilp")

    def whole(self, choices: Sequence[Choice], source: Source) -> list[Trial]:
        """Measure new configurations on all the calibration data; those that were measured before are left out.

        Of uniform ones nothing is expected: they come before there is anything to expect it from.
        """
        new = self._new(choices)
        if not new:
            return []
        fitted = None if source == "uniform" else self.surrogate()
        return self._told(new, source, [None] * len(new), fitted)

    def drawn(self, count: int) -> list[Choice]:
        """At most `count` configurations that are best if the predictions err as they well may, at random levels."""
        surrogate, generator = self.surrogate(), self._generator()
        return [
            choice
            for _ in range(count)
            for choice in self.sweep.frontier(surrogate.draw(generator), generator.choice(self.sweep.levels, 1))
        ]

    def rounds(self) -> Iterator[list[Trial]]:
        """Expand, propose, race and fit until the evaluations are spent or nothing promises anything; the trials of
        each round."""
        calm, expanded = 0, set[bytes]()
        visits = dict.fromkeys(thinned(self.sweep.roomy, self.left // SHARE), 0)
        while self.left:
            level, base = self._unexpanded(visits, expanded)
            if base is not None:
                visits[level] += 1
                expanded.add(base.choice.tobytes())
                if new := self._neighbours(base, level):
                    yield self.raced(new, expansions=base.expansions + 1)
                if visits[level] == 1 or self.ladders is not None:
                    # One expansion of every level buys more than anything else; of thousands of groups every one does.
                    continue
            if calm < 2 and self.left:
                fitted = self.surrogate()
                new, self.gain = propose(
                    fitted,
                    self.sweep,
                    *self._measured(),
                    min(self.together, self.left),
                    self._generator(),
                    self.most_loss,
                )
                calm = 2 if not new else calm + 1 if self.gain < CALM else 0
                if new:
                    yield self.raced(new, fitted)
            elif base is None:
                return

    def raced(
        self, choices: Sequence[Choice], fitted: Surrogate | None = None, expansions: int | None = None
    ) -> list[Trial]:
        """Measure new configurations, as many as are left, until what costs no more beats them; `fitted` says what is
        expected of them, and if it was not so many expansions that led to them, what they are to better counts."""
        new = self._new(choices)[: self.left]
        if not new:
            return []
        return self._told(new, "refined", self._rivals(new), fitted or self.surrogate(), expansions)

    def best(self, level: float) -> Trial | None:
        """Of the wholly measured configurations within all bounds and `level` that of least loss."""
        within = [trial for trial, cost in self._whole() if cost <= level * (1 + TOLERANCE)]
        return min(within, key=lambda trial: trial.loss, default=None)

    def _unexpanded(self, visits: Mapping[float, int], expanded: Set[bytes]) -> tuple[float, Trial | None]:
        """The level that was visited least among those whose best configuration was not expanded, and that one."""
        if self.expand is None or self.left < CHARGE + 1:
            return 0.0, None
        for level in sorted(visits, key=visits.__getitem__):
            best = self.best(level)
            if best is not None and best.choice.tobytes() not in expanded:
                return level, best
        return 0.0, None

    def _neighbours(self, base: Trial, level: float) -> list[Choice]:
        """What promises something near a configuration, new and as many as are left."""
        assert self.expand is not None
        self.spent += CHARGE
        near = self.expand(base.choice)
        if self.ladders is None:
            found = near.neighbours(self.sweep, level)
        else:
            found = self.ladders.neighbours(near, self.sweep, level)
        return self._new([choice for choice, adds in found if adds < -CALM * base.loss])[: self.left]

    def _told(
        self,
        choices: Sequence[Choice],
        source: Source,
        rivals: Sequence[Trial | None],
        fitted: Surrogate | None,
        expansions: int | None = None,
    ) -> list[Trial]:
        expected: list[tuple[float, float] | None] = [None] * len(choices)
        if fitted is not None and any(trial.loss > 0 for trial in self.trials):
            means, deviations = fitted.predict(np.array(choices))
            expected = list(zip(means.tolist(), deviations.tolist(), strict=True))
        outcomes = race(self.measure, choices, [rival.samples if rival else None for rival in rivals], self.batch_sizes)
        inherited = [rival.expansions if rival else 0 for rival in rivals]
        told = [
            Trial(choice, source, outcome.loss, outcome.samples, before, led if expansions is None else expansions)
            for choice, outcome, before, led in zip(choices, outcomes, expected, inherited, strict=True)
        ]
        self.trials += told
        self.spent += sum(charged(outcome, self.batch_sizes) for outcome in outcomes)
        return told

    def _new(self, choices: Sequence[Choice]) -> list[Choice]:
        known = {trial.choice.tobytes() for trial in self.trials}
        return list({key: choice for choice in choices if (key := choice.tobytes()) not in known}.values())

    def _rivals(self, choices: Sequence[Choice]) -> list[Trial | None]:
        """Of each, the wholly measured configuration within all bounds of least loss among those that cost no more."""
        whole = self._whole()
        return [
            min((trial for trial, cost in whole if cost <= total), key=lambda trial: trial.loss, default=None)
            for total in self.sweep.totals(choices)
        ]

    def _whole(self) -> list[tuple[Trial, float]]:
        """What is measured on all the calibration data and within all bounds, and what it costs along the axis."""
        count = sum(self.batch_sizes)
        whole = [one for one in self.trials if len(one.samples) == count and self.sweep.admits(one.choice)]
        return list(zip(whole, self.sweep.totals([trial.choice for trial in whole]).tolist(), strict=True))

    def _measured(self) -> tuple[NDArray[np.int64], Floats]:
        choices = np.array([trial.choice for trial in self.trials], dtype=np.int64)
        units = self.features.logs.shape[0]
        return choices.reshape(len(self.trials), units), np.array([trial.loss for trial in self.trials])

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, len(self.trials)])


def first(count: int) -> tuple[int, int]:
    """How many of `count` evaluations go into predicted and into drawn configurations before the first fit."""
    start = max(min(count, TOGETHER), count // 4)
    drawn = round(DRAWN * start)
    return start - drawn, drawn
