"""Which configurations to measure: the uniform baselines first, then each metric's points along the budget sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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


def propose(
    space: Space,
    costs: Mapping[Resource, Cost],
    predicted: Mapping[str, NDArray[np.float64]],
    sweeps: Mapping[str, Sequence[Choice]],
    evaluations: int,
) -> list[Candidate]:
    """Candidates to measure, each allocation once, numbered from 1.

    `predicted` and `sweeps` hold, by metric, the units × schemes table and the choices of its sweep from the budget
    down. All uniform baselines come first; the rest of `evaluations` is shared evenly among the metrics, each sweep
    thinned to evenly spaced levels.
    """
    found: dict[str, Candidate] = {}

    def describe(source: Source, label: str, choice: Choice) -> Candidate:
        return Candidate(
            number=len(found) + 1,
            source=source,
            label=label,
            allocation=allocation.to_json(allocation.layer_schemes(space, choice)),
            predicted={name: float(table[np.arange(len(choice)), choice].sum()) for name, table in predicted.items()},
            costs={resource: cost.total(choice) for resource, cost in costs.items()},
        )

    def key(choice: Choice) -> str:
        return allocation.digest(allocation.layer_schemes(space, choice))

    for scheme in space.schemes:
        choice = space.uniform(scheme)
        if choice is not None:
            found.setdefault(key(choice), describe("uniform", f"uniform {scheme}", choice))
    left = max(0, evaluations - len(found))
    for index, (metric, sweep) in enumerate(sweeps.items()):
        share = left // (len(sweeps) - index)
        for choice in _thinned([choice for choice in sweep if key(choice) not in found], share):
            label = f"{metric}, {costs['avg_bits'].total(choice):.2f} bits"
            found[key(choice)] = describe("ilp", label, choice)
            left -= 1
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


def _thinned(sweep: Sequence[Choice], most: int) -> list[Choice]:
    if most <= 0:
        return []
    if len(sweep) <= most:
        return list(sweep)
    return [sweep[index] for index in np.unique(np.linspace(0, len(sweep) - 1, most).round().astype(int))]
