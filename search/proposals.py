"""Candidates: how a choice becomes one, which of several sweeps are measured, and which fit and form the frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from search import allocation
from search.budget import BUDGETS, Bound
from search.candidate import Candidate, Source
from search.cost import Cost, Resource
from search.pareto import undominated
from search.space import Space
from search.surrogate import Surrogate
from search.sweep import Choice, thinned


def axes(bounds: Sequence[Bound], objective: str = "loss") -> list[Resource]:
    """The resources a frontier is drawn over: that of the `objective` (`loss`, or the name of a budget), and those with
    a budget on the whole model; else `size_bytes`."""
    sought = [] if objective == "loss" else [BUDGETS[objective].resource]
    bounded = [bound.resource for bound in bounds if bound.of is None]
    return list(dict.fromkeys(sought + bounded)) or ["size_bytes"]


@dataclass(frozen=True, slots=True)
class Drafts:
    """Makes candidates of choices: what they cost, and what each metric predicts, as the baselines correct it."""

    space: Space
    costs: Mapping[Resource, Cost]
    predicting: Mapping[str, Surrogate]

    def candidate(self, number: int, source: Source, label: str, choice: Choice) -> Candidate:
        """An unmeasured candidate."""
        return Candidate(
            number=number,
            source=source,
            label=label,
            allocation=self.allocation(choice),
            predicted=self.predicted(choice),
            costs={resource: cost.total(choice) for resource, cost in self.costs.items()},
        )

    def allocation(self, choice: Choice) -> dict[str, str]:
        """Layer name → scheme text."""
        return allocation.to_json(allocation.layer_schemes(self.space, choice))

    def predicted(self, choice: Choice) -> dict[str, float]:
        """The loss by metric."""
        return {
            metric: float(np.exp(surrogate.predict(choice[None])[0][0]))
            for metric, surrogate in self.predicting.items()
        }


def baselines(space: Space) -> dict[str, Choice]:
    """The uniform configurations of a space, by label."""
    uniform = [(scheme, space.uniform(scheme)) for scheme in space.schemes]
    return {f"uniform {scheme}": choice for scheme, choice in uniform if choice is not None}


def shared(
    sweeps: Mapping[str, Sequence[Choice]], count: int, known: Sequence[Choice] = ()
) -> list[tuple[str, Choice]]:
    """`count` choices at most, each once and none of those `known`, with the metric that proposes it.

    Shared evenly among the metrics, each sweep thinned to evenly spaced levels.
    """
    found: dict[bytes, tuple[str, Choice]] = {}
    seen = {choice.tobytes() for choice in known}
    for index, (metric, sweep) in enumerate(sweeps.items()):
        share = -(-max(0, count - len(found)) // (len(sweeps) - index))
        new = {key: choice for choice in sweep if (key := choice.tobytes()) not in seen and key not in found}
        found |= {choice.tobytes(): (metric, choice) for choice in thinned(list(new.values()), share)}
    return list(found.values())


def judge(
    candidates: Sequence[Candidate], bounds: Sequence[Bound], loss_increase: float | None, over: Sequence[Resource]
) -> list[Candidate]:
    """Say of each candidate whether it fits all budgets, and whether it is on the frontier of those that do.

    The frontier holds measured candidates only, undominated in (loss, *`over`).
    """
    fits = np.array(
        [
            candidate.loss is not None
            and all(bound.admits(candidate.costs[bound.resource]) for bound in bounds)
            and (
                loss_increase is None
                or max(candidate.loss, candidate.metrics.get("acceptance_loss", 0.0)) <= loss_increase
            )
            for candidate in candidates
        ],
        dtype=bool,
    )
    objectives = np.array(
        [
            [
                candidate.loss if fit and candidate.loss is not None else np.nan,
                *(candidate.costs[name] for name in over),
            ]
            for candidate, fit in zip(candidates, fits, strict=True)
        ]
    ).reshape(len(candidates), 1 + len(over))
    best = undominated(objectives)
    return [
        replace(candidate, fits=bool(fit), on_frontier=bool(front))
        for candidate, fit, front in zip(candidates, fits, best, strict=True)
    ]
