"""Integer program: the least predicted loss under any number of budgets.

    min Σ_us loss_us·x_us   such that   Σ_s x_us = 1 for every unit u,   constant + Σ_us cost_us·x_us ≤ limit per budget

as HAWQ-V3 (Yao et al., 2011.10680, §3.4) allocates bits; and a cost in the place of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from search import knapsack, program
from search.budget import TOLERANCE, Bound
from search.cost import Cost, Resource, proportion
from search.knapsack import GAP, Solution, open_choices
from search.switches import Floats


def solve(
    loss: Floats,
    costs: Mapping[Resource, Cost],
    bounds: Sequence[Bound],
    *,
    minimise: Resource = "loss",
    most_loss: float | None = None,
    time_limit: float = 10.0,
    prove: bool = True,
    gap: float = GAP,
) -> Solution:
    """The allocation of the least predicted loss, or of the least cost that `minimise` names, within `bounds`.

    `loss` is units × schemes; a choice is open where it and its costs are finite, and closed where one is inf. The
    total loss is at most `most_loss`: to minimise a cost is the same program with the loss as one more bounded cost.
    It is proved to a relative `gap`, unless `time_limit`, in seconds, comes first. Without `prove`, what prices find
    near at once, with its gap; only where they find nothing is the program solved.

    Raises ValueError for a loss or a cost that is NaN or −inf, with its unit and scheme.
    """
    tables = {"loss": Cost("loss", loss, 0.0), **costs}
    if most_loss is not None:
        bounds = [*bounds, Bound("loss_increase", "loss", most_loss)]
    bounds = _distinct(tables, bounds)
    objective = tables[minimise]
    open_ = open_choices({name: cost.table for name, cost in tables.items()})
    found = program.solve(
        np.where(open_, objective.table, np.inf),
        np.array([tables[bound.resource].table for bound in bounds]).reshape(len(bounds), *loss.shape),
        np.array([bound.capacity(tables[bound.resource]) for bound in bounds]),
        time_limit=time_limit,
        prove=prove,
        gap=gap,
    )
    return replace(found, objective=found.objective + objective.constant, bound=found.bound + objective.constant)


def levels(costs: Mapping[Resource, Cost], bounds: Sequence[Bound], axis: Resource, points: int) -> Floats:
    """`points` totals of `axis`, evenly spaced from its budget down to the smallest that the other budgets leave.

    Without a budget on `axis` they begin at its largest total.
    """
    own = [bound.limit for bound in bounds if bound.resource == axis]
    others = [bound for bound in bounds if bound.resource != axis]
    highest = min([costs[axis].largest, *own])
    least = solve(np.zeros_like(costs[axis].table), costs, others, minimise=axis, prove=False)
    smallest = costs[axis].smallest if least.choice is None else least.objective
    return np.linspace(highest, smallest, points) if points > 1 else np.array([highest])


def frontier(
    loss: Floats,
    costs: Mapping[Resource, Cost],
    bounds: Sequence[Bound],
    axis: Resource,
    levels: Iterable[float],
    *,
    time_limit: float = 10.0,
    prove: bool = True,
    gap: float = GAP,
) -> list[Solution]:
    """Solve for totals of `axis` of at most each of `levels`; all bounds hold at every level, those on `axis` too.

    Levels that give the same allocation are returned once, infeasible ones not at all; unsolved ones are, without a
    choice. `time_limit` (of each level), `prove`, `gap` and what is raised are those of `solve`.
    """
    own, *others = _distinct(costs, [Bound(axis, axis, np.inf), *bounds])
    at = [replace(own, limit=min(float(level), own.limit)) for level in levels]

    def solved(level: Bound) -> Solution:
        return solve(loss, costs, [level, *others], time_limit=time_limit, prove=prove, gap=gap)

    if others:
        solutions = [solved(level) for level in at]
    else:
        open_ = open_choices({"loss": loss} | {name: cost.table for name, cost in costs.items()})
        capacities = [level.capacity(costs[axis]) for level in at]
        near = knapsack.frontier(np.where(open_, loss, np.inf), costs[axis].table, capacities, prove=prove, gap=gap)
        solutions = [
            solved(level) if prove and one.status == "feasible" else one for one, level in zip(near, at, strict=True)
        ]
    found: dict[object, Solution] = {}
    for level, solution in zip(at, solutions, strict=True):
        if solution.status != "infeasible":
            found.setdefault(solution.choice.tobytes() if solution.choice is not None else level, solution)
    return list(found.values())


def _distinct(costs: Mapping[Resource, Cost], bounds: Iterable[Bound]) -> list[Bound]:
    """One bound for all on proportional costs, as size and average bits are: the tightest, as one on the first's."""
    kept: list[Bound] = []
    for bound in bounds:
        for place, first in enumerate(kept):
            ratio = proportion(costs[bound.resource], costs[first.resource])
            if ratio is not None:
                # By what they leave: the tolerance is relative to limits, which may count much that is not searched.
                left = bound.capacity(costs[bound.resource]) * ratio + costs[first.resource].constant
                limit = left / (1 + float(np.copysign(TOLERANCE / 2, left)))
                kept[place] = replace(first, limit=min(limit, first.limit))
                break
        else:
            kept.append(bound)
    return kept
