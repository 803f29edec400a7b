"""The configurations of a search: measured on the calibration data, accepted on another split, reported on a third."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import exp, log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from db.candidates import candidates, put_candidates
from db.events import tell
from db.states import Stage
from search.acceptance import accepted, finalists
from search.candidate import Candidate, Source
from search.expansion import CHARGE, Expansion
from search.measurement import metrics
from search.prices import share_prices
from search.proposals import Drafts, judge
from search.racing import stops
from search.refinement import Trial
from search.surrogate import Surrogate
from search.sweep import Choice, Sweep
from workers.calibration import Split
from workers.margin import margin
from workers.profiling import Profile
from workers.run import Run
from workers.sensitivity.expansion import expansion
from workers.tasks import MEASURE, Item, Result, Task, content_key

Floats = NDArray[np.float64]

FEW = 8
"""Samples, with fewer of which a paired bootstrap accepts what it should not."""

LEVEL = 0.9
NORMAL = 1.645
"""Of the intervals of what is expected, and the standard deviations that they reach to either side."""

WIDEST = 50.0
"""How far they reach in the logarithm at most: beyond, nothing is known either way."""


@dataclass(slots=True)
class Measuring:
    """The trials of a search and the candidates that they become, judged and stored as results come.

    What an attempt before this one has shown stands until this one knows as much.
    """

    run: Run
    profile: Profile
    sweep: Sweep
    drafts: Drafts
    candidates: list[Candidate] = field(default_factory=list)
    trials: dict[int, Trial] = field(default_factory=dict)
    """By the place of their candidates."""
    _anchors: dict[float, tuple[float, Floats]] = field(default_factory=dict)
    """Of uniform configurations, by the logarithm of their calibration loss: that of held-out ÷ calibration loss, and
    the losses of the calibration samples."""
    _places: dict[bytes, int] = field(default_factory=dict)
    _shown: int = 0
    """So many measured candidates an attempt before this one has stored."""
    _stored: list[Candidate] | None = None
    """What this attempt has stored last; None before it has."""
    _stage: Stage = "baselines"
    _progress: tuple[float, float] = (0, 0)

    def __post_init__(self) -> None:
        run = self.run
        if run.claim.attempt > 1:
            known = run.insist(lambda: candidates(run.engine, run.claim.search_id))
            self._shown = sum(bool(one.metrics) for one in known)

    def enter(self, stage: Stage, total: int) -> None:
        """Begin a stage of so many evaluations."""
        self._stage, self._progress = stage, (0, total)
        self.run.enter(stage, total)

    def measure(self, choices: Sequence[Choice], batches: range) -> list[Floats]:
        """The loss of every sample in a range of the calibration batches, of each choice: `search.racing.Measure`."""
        sizes = self.profile.batch_sizes
        parts = [part for part in pairwise(stops(len(sizes))) if batches.start <= part[0] and part[1] <= batches.stop]
        allocations = [self.drafts.allocation(choice) for choice in choices]
        items: list[Item] = [
            {"allocation": allocation, "split": "calibration", "batches": list(part)}
            for allocation in allocations
            for part in parts
        ]
        share = sum(sizes[batches.start : batches.stop]) / sum(sizes)
        results = self.run.compute(MEASURE, items, self._stage, part=(*self._progress, share / max(len(parts), 1)))
        self._progress = (self._progress[0] + share * len(choices), self._progress[1])
        rows = [results[start : start + len(parts)] for start in range(0, len(results), len(parts))]
        return [np.concatenate([part["loss"] for part in row]) for row in rows]

    def expand(self, choice: Choice) -> Expansion:
        """`search.expansion.Expand`, at so many evaluations."""

        def compute(task: Task, items: Sequence[Item]) -> list[Result]:
            return self.run.compute(task, items, self._stage, part=(*self._progress, CHARGE / len(items)))

        found = expansion(compute, self.profile.space, self.profile.batch_sizes, choice)
        self._progress = (self._progress[0] + CHARGE, self._progress[1])
        return found

    def propose(self, labelled: Sequence[tuple[str, Choice]], source: Source) -> None:
        """Make candidates of choices that are going to be measured."""
        for label, choice in labelled:
            self._place(choice, source, label)
        self._judge()

    def add(self, trials: Sequence[Trial]) -> None:
        """Make candidates of new trials, unless they were proposed, and store what all are worth by now."""
        for trial in trials:
            bits = self.profile.costs["avg_bits"].total(trial.choice)
            at = self._place(trial.choice, trial.source, f"{trial.source}, {bits:.2f} bits")
            self.trials[at] = trial
            told = replace(self.candidates[at], expected=self._expected(trial), metrics=self._searched(trial))
            self.candidates[at] = told
        self._judge()
        for trial in trials:
            self._tell(self.candidates[self._places[trial.choice.tobytes()]])

    def anchor(self) -> None:
        """Measure the uniform configurations on held-out data, too, as they are reported in any case: by as much as
        they lose more or less there than on the calibration data, others are expected to."""
        for at, told in self._samples(list(self.trials), "held_out").items():
            trial, loss = self.trials[at], metrics(told)["loss"]
            if trial.loss > 0 and loss > 0:
                self._anchors[log(trial.loss)] = log(loss / trial.loss), trial.samples

    def predict_with(self, drafts: Drafts) -> None:
        """Predict all candidates anew."""
        self.drafts = drafts
        for at, trial in self.trials.items():
            self.candidates[at] = replace(self.candidates[at], predicted=drafts.predicted(trial.choice))
        self._judge()

    def accept(self) -> None:
        """Measure the best of every level on data that the search has not seen; report, on a third split, what stands
        there, and the uniform configurations."""
        tried = sorted(self.trials)
        trials = [self.trials[at] for at in tried]
        losses, tiers = np.array([trial.loss for trial in trials]), [trial.tier for trial in trials]
        chosen = finalists(self.sweep, [trial.choice for trial in trials], losses, tiers)
        self.enter("accept", 2 * len(chosen))
        if sum(self.profile.batch_sizes) < FEW:
            self.run.notice(
                f"calibration.samples is {sum(self.profile.batch_sizes)}: so few tell little about which "
                f"configurations are better; {FEW} or more are advised"
            )
        heard = self._samples([tried[index] for index in chosen], "acceptance")
        costs = np.array([[self.candidates[at].costs[name] for name in self.profile.axes] for at in heard])
        # What breaks a budget is at nobody's disposal, and no reason to refuse what keeps them all.
        costs[[not self.sweep.admits(trials[index].choice) for index in chosen]] = np.inf
        losses = np.array([told["loss"] for told in heard.values()])
        samples = [trials[index].samples for index in chosen]
        stands = accepted(losses, costs, [tiers[index] for index in chosen], samples)
        reported = [tried[index] for index, stand in zip(chosen, stands, strict=True) if stand or not tiers[index]]
        self._progress = (len(chosen), len(chosen) + len(reported))
        told = self._samples(reported, "held_out")
        for at, trial in self.trials.items():
            found = self._searched(trial)
            del found["loss"], found["loss_stderr"]
            if at in heard:
                found["acceptance_loss"] = metrics(heard[at])["loss"]
            if at in told:
                found = metrics(told[at]) | found
            self.candidates[at] = replace(self.candidates[at], metrics=found)
        self._judge()
        for at in reported:
            self._tell(self.candidates[at])
        self.run.summary["acceptance"] = {"finalists": len(chosen), "accepted": int(stands.sum())}
        self.run.summary["coverage"] = coverage(self.candidates)

    def compute(self, task: Task, items: Sequence[Item]) -> list[Result]:
        """What else has to be known, without progress of its own."""
        return self.run.compute(task, items, self._stage, part=(*self._progress, 0))

    def price(self, surrogate: Surrogate) -> None:
        """Say, of every point of the frontier, what share of its loss more of the bounded resources would save."""
        bounded = dict.fromkeys([*self.profile.axes, *(bound.resource for bound in self.profile.bounds)])
        for at, candidate in enumerate(self.candidates):
            if candidate.on_frontier:
                self.run.pause()
                limits = {name: candidate.costs[name] for name in bounded}
                shares = share_prices(surrogate.table, self.profile.costs, limits, surrogate.power)
                self.candidates[at] = replace(candidate, shadow_prices=shares)
        self._store()

    def _place(self, choice: Choice, source: Source, label: str) -> int:
        """Where the candidate of a choice stands; a new one stands last."""
        at = self._places.setdefault(choice.tobytes(), len(self.candidates))
        if at == len(self.candidates):
            self.candidates.append(self.drafts.candidate(at + 1, source, label, choice))
        return at

    def _samples(self, indices: Sequence[int], split: Split) -> dict[int, Result]:
        items: list[Item] = [{"allocation": self.candidates[index].allocation, "split": split} for index in indices]
        results = self.run.compute(MEASURE, items, self._stage, part=(*self._progress, 1))
        return dict(zip(indices, results, strict=True))

    def _searched(self, trial: Trial) -> dict[str, float]:
        found = metrics({"loss": trial.samples.tolist()}) | {"loss": trial.loss, "calibration_loss": trial.loss}
        share = len(trial.samples) / sum(self.profile.batch_sizes)
        return found | ({"calibration_share": share} if share < 1 else {})

    def _expected(self, trial: Trial) -> dict[str, float]:
        """Of the loss on held-out data: as the fit expects it on the calibration data, more or less by what uniform
        configurations of like losses lose there; and as far off as the two splits' ratios to those may be."""
        if trial.expected is None:
            return {}
        (mean, deviation), measured = trial.expected, len(trial.samples)
        shift, beside = 0.0, _shares(np.ones(measured))
        if self._anchors:
            logs = sorted(self._anchors)
            weights = np.array([np.interp(mean, logs, one) for one in np.eye(len(logs))])
            shift = float(weights @ [self._anchors[at][0] for at in logs])
            beside = weights @ [_shares(self._anchors[at][1][:measured]) for at in logs]
        by_documents = margin(_shares(trial.samples), beside, self.profile.documents[:measured], LEVEL)
        reach = min(sqrt((NORMAL * deviation) ** 2 + 2 * by_documents**2), WIDEST)
        return {"loss": exp(mean + shift), "low": exp(mean + shift - reach), "high": exp(mean + shift + reach)}

    def _judge(self) -> None:
        limit, over = self.run.request.budgets.loss_increase, self.profile.axes
        self.candidates[:] = judge(self.candidates, self.profile.bounds, limit, over)
        if len(self.trials) >= self._shown:
            self._store()

    def _store(self) -> None:
        before, self._stored = self._stored, None  # what is stored when this fails, nobody knows
        self.run.insist(lambda: put_candidates(self.run.engine, self.run.claim, self.candidates, before))
        self._stored = list(self.candidates)

    def _tell(self, candidate: Candidate) -> None:
        about: dict[str, Any] = {"number": candidate.number, "label": candidate.label, "source": candidate.source}
        about |= {"loss": candidate.loss, "costs": candidate.costs}
        once = f"measured:{candidate.number}:{content_key(about)}"
        self.run.insist(lambda: tell(self.run.engine, self.run.claim, "measured", about, once))


def coverage(candidates: Sequence[Candidate]) -> dict[str, float | int]:
    """How many of the reported losses lie within the interval that was expected; of uniform ones nothing was."""
    told = [one for one in candidates if one.loss is not None and one.expected]
    within = sum(one.expected["low"] <= (one.loss or 0.0) <= one.expected["high"] for one in told)
    return {"level": LEVEL, "within": within, "points": len(told)}


def _shares(losses: Floats) -> Floats:
    """Of the samples in the sum; equal ones where nothing is lost."""
    total = float(losses.sum())
    return losses / total if total > 0 else np.full(len(losses), 1 / len(losses))
