"""Which configurations to measure: the uniform baselines first, then each metric's points along the budget sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from search import allocation
from search.budget import Bound
from search.candidate import Candidate, Source
from search.cost import Cost, Resource
from search.pareto import undominated
from search.space import Space

Choice = NDArray[np.int64]


def axes(bounds: Sequence[Bound]) -> list[Resource]:
    """The resources a frontier is drawn over: those with a budget, `size_bytes` when there is none."""
    return list(dict.fromkeys(bound.resource for bound in bounds)) or ["size_bytes"]


@dataclass(frozen=True, slots=True)
class Drafts:
    """Makes candidates of choices: what they cost, and what each metric predicts (tables of units × schemes)."""

    space: Space
    costs: Mapping[Resource, Cost]
    predicted: Mapping[str, NDArray[np.float64]]

    def candidate(self, number: int, source: Source, label: str, choice: Choice) -> Candidate:
        """An unmeasured candidate."""
        rows = np.arange(len(choice))
        return Candidate(
            number=number,
            source=source,
            label=label,
            allocation=allocation.to_json(allocation.layer_schemes(self.space, choice)),
            predicted={metric: float(table[rows, choice].sum()) for metric, table in self.predicted.items()},
            costs={resource: cost.total(choice) for resource, cost in self.costs.items()},
        )

    def baselines(self) -> list[Candidate]:
        """The uniform configurations of the space, numbered from 1."""
        uniform = [(scheme, self.space.uniform(scheme)) for scheme in self.space.schemes]
        choices = [(f"uniform {scheme}", choice) for scheme, choice in uniform if choice is not None]
        return [self.candidate(number, "uniform", *choice) for number, choice in enumerate(choices, start=1)]

    def proposals(
        self, baselines: Sequence[Candidate], sweeps: Mapping[str, Sequence[Choice]], evaluations: int
    ) -> list[Candidate]:
        """`baselines` first, then points of the `sweeps` (by metric, from the budget down).

        What `evaluations` leaves after the baselines is shared evenly among the metrics, each sweep thinned to evenly
        spaced levels; an allocation is proposed once.
        """
        found = {_key(candidate): candidate for candidate in baselines}
        # A search whose baselines all miss the budget has nothing to show without one proposal.
        most = max(evaluations, len(found) + (not any(candidate.fits for candidate in baselines)))
        for index, (metric, sweep) in enumerate(sweeps.items()):
            share = -(-max(0, most - len(found)) // (len(sweeps) - index))
            new = {}
            for choice in sweep:
                label = f"{metric}, {self.costs['avg_bits'].total(choice):.2f} bits"
                candidate = self.candidate(0, "ilp", label, choice)
                if _key(candidate) not in found:
                    new[_key(candidate)] = candidate
            found |= {_key(candidate): candidate for candidate in _thinned(list(new.values()), share)}
        return [replace(candidate, number=number) for number, candidate in enumerate(found.values(), start=1)]


def _key(candidate: Candidate) -> str:
    return allocation.digest(allocation.from_json(candidate.allocation))


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
            and (loss_increase is None or candidate.loss <= loss_increase)
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


def _thinned(candidates: list[Candidate], most: int) -> list[Candidate]:
    if len(candidates) <= most:
        return candidates
    return [candidates[round(level)] for level in np.linspace(0, len(candidates) - 1, most)]
