"""Integer program: the least predicted loss under any number of budgets.

    min Σ_us loss_us·x_us   such that   Σ_s x_us = 1 for every unit u,   constant + Σ_us cost_us·x_us ≤ limit per budget

as HAWQ-V3 (Yao et al., 2011.10680, §3.4) allocates bits. One budget is a knapsack. With several, prices close what no
better allocation can take, and PuLP with HiGHS solves what stays open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import pulp
from numpy.typing import NDArray

from search import knapsack
from search.budget import BUDGETS, TOLERANCE, Bound
from search.cost import Cost, Resource
from search.errors import InfeasibleBudget
from search.knapsack import GAP, Solution, Status
from search.lagrangian import allocate, price

OBJECTIVE_SCALE = 1000.0
"""The relaxation's objective is scaled to this: solvers stop at absolute tolerances, and losses may be far below 1."""


def solve(
    loss: NDArray[np.float64],
    costs: Mapping[Resource, Cost],
    bounds: Sequence[Bound],
    *,
    time_limit: float = 10.0,
    prove: bool = True,
) -> Solution:
    """The allocation of least predicted loss within `bounds`.

    `loss` is units × schemes; a scheme is open to a unit where its costs are finite. `time_limit` is in seconds.
    Without `prove`, what prices find near at once, with its gap; only where they find nothing is the program solved.
    """
    tables = [costs[bound.resource] for bound in bounds]
    open_ = np.isfinite(loss)
    for cost in costs.values():
        open_ = open_ & np.isfinite(cost.table)
    if len(bounds) == 1:
        capacity = _capacity(bounds[0], tables[0])
        found = knapsack.solve(np.where(open_, loss, np.inf), tables[0].table, capacity, prove=prove)
        if found.status != "feasible" or not prove:
            return found
    open_ &= ~_dominated(loss, [cost.table for cost in tables], open_)
    if not open_.any(axis=1).all():
        return Solution("infeasible")

    within, costs_of = np.where(open_, loss, np.inf), np.stack([cost.table for cost in tables])
    capacities = np.array([_capacity(bound, cost) for bound, cost in zip(bounds, tables, strict=True)])
    pricing = price(within, costs_of, capacities)
    known = allocate(pricing, within, np.where(open_, costs_of, np.inf), capacities)
    if known is not None and _fits(known, tables, bounds):
        total = float(loss[np.arange(len(known)), known].sum())
        if total - pricing.bound <= GAP * abs(pricing.bound):
            return Solution("optimal", known, total, min(pricing.bound, total))
        if not prove:
            return Solution("feasible", known, total, pricing.bound)
        # A choice that loses more than the gap above its unit's least cannot be part of a better allocation.
        open_ &= pricing.reduced <= (total - pricing.bound) + GAP * abs(pricing.bound)
        open_[np.arange(len(known)), known] = True
    else:
        known = None

    exact = _Program(loss, open_, tables, bounds)
    status = exact.solve(time_limit)
    if status == "infeasible" and known is None:
        return Solution(status)
    choice = exact.choice() if status in ("optimal", "feasible") else None
    if choice is None or not _fits(choice, tables, bounds):
        choice, status = known, "feasible" if known is not None else "unsolved"
    if choice is None:
        return Solution(status, bound=pricing.bound)
    total = float(loss[np.arange(len(choice)), choice].sum())
    return Solution(status, choice, total, total if status == "optimal" else min(pricing.bound, total))


def frontier(
    loss: NDArray[np.float64],
    costs: Mapping[Resource, Cost],
    bounds: Sequence[Bound],
    axis: Resource,
    points: int,
    *,
    time_limit: float = 10.0,
) -> list[Solution]:
    """Solve for `points` levels of `axis`, evenly spaced from its smallest feasible total to its budget.

    Without a budget on `axis` the levels end at its largest total. The other budgets hold at every level. Levels that
    give the same allocation are returned once, infeasible ones not at all; unsolved ones are, without a choice.
    """
    own = [bound.limit for bound in bounds if bound.resource == axis]
    others = [bound for bound in bounds if bound.resource != axis]
    smallest, highest = costs[axis].smallest, min([costs[axis].largest, *own])
    levels = np.linspace(highest, smallest, points) if points > 1 else np.array([highest])
    found: dict[object, Solution] = {}
    for level in levels:
        solution = solve(loss, costs, [*others, Bound(axis, axis, float(level))], time_limit=time_limit)
        if solution.status != "infeasible":
            found.setdefault(solution.choice.tobytes() if solution.choice is not None else level, solution)
    return list(found.values())


def check_jointly_feasible(costs: Mapping[Resource, Cost], bounds: Sequence[Bound]) -> None:
    """Refuse budgets that each can be met alone but not together.

    Raises InfeasibleBudget naming, for each, the smallest value that the others leave.
    """
    if len(bounds) < 2 or solve(_nothing_to_lose(costs), costs, bounds).status != "infeasible":
        return
    minimum = {}
    for bound in bounds:
        others = [other for other in bounds if other is not bound]
        least = solve(costs[bound.resource].table, costs, others)
        if least.choice is not None:
            minimum[bound.budget] = costs[bound.resource].total(least.choice) / BUDGETS[bound.budget].scale
    raise InfeasibleBudget(
        "each of these budgets can be met alone, but no allocation meets all: "
        + ", ".join(f"{name} ≥ {value:g} while the others hold" for name, value in minimum.items()),
        field="budgets",
        value={bound.budget: bound.limit / BUDGETS[bound.budget].scale for bound in bounds},
        accepted={"minimum_given_the_others": minimum},
    )


def _fits(choice: NDArray[np.int64], tables: Sequence[Cost], bounds: Sequence[Bound]) -> bool:
    return all(bound.admits(table.total(choice)) for bound, table in zip(bounds, tables, strict=True))


def _capacity(bound: Bound, cost: Cost) -> float:
    """What a budget leaves for the units."""
    return bound.limit * (1 + TOLERANCE) - cost.constant


def _nothing_to_lose(costs: Mapping[Resource, Cost]) -> NDArray[np.float64]:
    return np.zeros_like(next(iter(costs.values())).table)


def _dominated(
    loss: NDArray[np.float64], tables: Sequence[NDArray[np.float64]], open_: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Choices that another open one of the same unit equals or betters in the loss and every bounded cost."""
    objectives = np.stack([np.where(open_, table, np.inf) for table in (loss, *tables)])
    dominated = np.zeros_like(open_)
    columns = loss.shape[1]
    for one in range(columns):
        for other in range(columns):
            if one == other:
                continue
            no_worse = (objectives[:, :, other] <= objectives[:, :, one]).all(axis=0) & open_[:, other]
            better = (objectives[:, :, other] < objectives[:, :, one]).any(axis=0)
            dominated[:, one] |= no_worse & (better | (other < one))
    return dominated


class _Program:
    """A PuLP problem over the units that have several open choices, its objective and budgets scaled for the solver."""

    def __init__(
        self, loss: NDArray[np.float64], open_: NDArray[np.bool_], tables: Sequence[Cost], bounds: Sequence[Bound]
    ) -> None:
        self._settled = open_.argmax(axis=1)
        units = np.flatnonzero(open_.sum(axis=1) > 1)
        self._at = [(int(u), int(s)) for u in units for s in np.flatnonzero(open_[u])]
        self._problem = pulp.LpProblem("allocation", pulp.LpMinimize)
        self._x = [self._problem.add_variable(f"x_{u}_{s}", cat=pulp.LpBinary) for u, s in self._at]
        # Only differences matter: those of each unit from its least.
        losses = np.array([loss[u, s] - loss[u, open_[u]].min() for u, s in self._at])
        self._problem += self._sum(losses * OBJECTIVE_SCALE / max(losses.max(initial=0.0), 1e-300))
        for _, row in groupby(zip(self._x, self._at, strict=True), lambda pair: pair[1][0]):
            self._problem += pulp.LpAffineExpression((x, 1) for x, _ in row) == 1
        self._rooms: list[float] = []
        others = np.setdiff1d(np.arange(len(loss)), units)
        for bound, cost in zip(bounds, tables, strict=True):
            room = _capacity(bound, cost) - cost.table[others, self._settled[others]].sum()
            self._rooms.append(room)
            costs = np.array([cost.table[at] for at in self._at])
            # In thousandths of the costs that are still open, so that feasibility tolerances are relative to them.
            scale = 1000 / max(np.abs(costs).max(initial=0.0), abs(room), 1e-300)
            self._problem += self._sum(costs * scale) <= room * scale

    def _sum(self, factors: NDArray[np.float64]) -> pulp.LpAffineExpression:
        return pulp.LpAffineExpression((x, float(factor)) for x, factor in zip(self._x, factors, strict=True))

    def solve(self, time_limit: float) -> Status:
        if not self._x:
            return "optimal" if min(self._rooms) >= 0 else "infeasible"
        solver = pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=GAP, threads=1, mip_feasibility_tolerance=1e-9)
        self._problem.solve(solver)
        # PuLP calls a time-out "Optimal": only sol_status tells them apart.
        return {
            pulp.LpSolutionOptimal: "optimal",
            pulp.LpSolutionIntegerFeasible: "feasible",
            pulp.LpSolutionInfeasible: "infeasible",
        }.get(self._problem.sol_status, "unsolved")  # type: ignore[return-value]

    def choice(self) -> NDArray[np.int64] | None:
        """The schemes chosen; None where the solver's answer is not integral."""
        choice: NDArray[np.int64] = self._settled.copy()
        for x, (unit, scheme) in zip(self._x, self._at, strict=True):
            if abs((x.varValue or 0.0) - round(x.varValue or 0.0)) > 1e-4:
                return None
            if (x.varValue or 0.0) > 0.5:
                choice[unit] = scheme
        return choice
