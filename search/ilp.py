"""Integer program: the least predicted loss under any number of budgets; a single one is a knapsack.

    min Σ_us loss_us·x_us   such that   Σ_s x_us = 1 for every unit u,   constant + Σ_us cost_us·x_us ≤ limit per budget

by PuLP and HiGHS, as HAWQ-V3 (Yao et al., 2011.10680, §3.4) allocates bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pulp
from numpy.typing import NDArray

from search import knapsack
from search.budget import BUDGETS, TOLERANCE, Bound
from search.cost import Cost, Resource
from search.errors import InfeasibleBudget
from search.knapsack import GAP, Solution, Status

OBJECTIVE_SCALE = 1000.0
"""The relaxation's objective is scaled to this: solvers stop at absolute tolerances, and losses may be far below 1."""


def solve(
    loss: NDArray[np.float64],
    costs: Mapping[Resource, Cost],
    bounds: Sequence[Bound],
    *,
    time_limit: float = 10.0,
) -> Solution:
    """The allocation of least predicted loss within `bounds`.

    `loss` is units × schemes; a scheme is open to a unit where its costs are finite. `time_limit` is in seconds.
    """
    tables = [costs[bound.resource] for bound in bounds]
    open_ = np.isfinite(loss)
    for cost in costs.values():
        open_ = open_ & np.isfinite(cost.table)
    if len(bounds) == 1:
        found = knapsack.solve(np.where(open_, loss, np.inf), tables[0].table, _capacity(bounds[0], tables[0]))
        if found.status != "feasible":
            return found
    open_ &= ~_dominated(loss, [cost.table for cost in tables], open_)
    if not open_.any(axis=1).all():
        return Solution("infeasible")

    relaxed = _Program(loss, open_, tables, bounds, scale=_spread(loss, open_))
    status = relaxed.solve(mip=False, time_limit=time_limit)
    if status != "optimal":
        return Solution(status)
    bound = relaxed.objective()
    rounded = relaxed.rounded(tables)
    if _fits(rounded, tables, bounds):
        # Reduced-cost fixing: a choice whose reduced cost exceeds the gap cannot be part of a better allocation.
        gap = float(loss[np.arange(len(rounded)), rounded].sum()) - bound
        open_ = open_ & (relaxed.reduced_costs() <= gap + GAP * abs(bound))
        open_[np.arange(len(rounded)), rounded] = True

    spread = _spread(loss, open_)
    scale = OBJECTIVE_SCALE / abs(bound) if abs(bound) * spread > 1e-6 else spread
    exact = _Program(loss, open_, tables, bounds, scale=scale)
    status = exact.solve(mip=True, time_limit=time_limit)
    if status in ("infeasible", "unsolved"):
        return Solution(status, bound=bound)
    choice = exact.choice()
    if choice is None or not _fits(choice, tables, bounds):
        return Solution("unsolved", bound=bound)
    total = float(loss[np.arange(len(choice)), choice].sum())
    return Solution(status, choice, total, total if status == "optimal" else bound)


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


def _spread(loss: NDArray[np.float64], open_: NDArray[np.bool_]) -> float:
    largest = float(np.abs(loss[open_]).max())
    return OBJECTIVE_SCALE / largest if largest > 0 else 1.0


class _Program:
    """One PuLP problem over the open choices, its objective and budgets scaled for the solver."""

    def __init__(
        self,
        loss: NDArray[np.float64],
        open_: NDArray[np.bool_],
        tables: Sequence[Cost],
        bounds: Sequence[Bound],
        scale: float,
    ) -> None:
        self._scale = scale
        self._shape = loss.shape
        self._at = [(int(u), int(s)) for u, s in np.argwhere(open_)]
        self._problem = pulp.LpProblem("allocation", pulp.LpMinimize)
        self._x = [self._problem.add_variable(f"x_{u}_{s}", cat=pulp.LpBinary) for u, s in self._at]
        self._problem += pulp.LpAffineExpression(
            (x, float(loss[at]) * scale) for x, at in zip(self._x, self._at, strict=True)
        )
        rows: list[list[pulp.LpVariable]] = [[] for _ in range(loss.shape[0])]
        for x, (unit, _) in zip(self._x, self._at, strict=True):
            rows[unit].append(x)
        for row in rows:
            self._problem += pulp.LpAffineExpression((x, 1) for x in row) == 1
        for bound, cost in zip(bounds, tables, strict=True):
            # In thousandths of the room that the budget leaves, so that feasibility tolerances are relative to it.
            room = max(_capacity(bound, cost), 1e-300)
            self._problem += (
                pulp.LpAffineExpression(
                    (x, float(cost.table[at]) / room * 1000) for x, at in zip(self._x, self._at, strict=True)
                )
                <= 1000
            )

    def solve(self, *, mip: bool, time_limit: float) -> Status:
        solver = pulp.HiGHS(
            mip=mip, msg=False, timeLimit=time_limit, gapRel=GAP, threads=1, mip_feasibility_tolerance=1e-9
        )
        self._problem.solve(solver)
        # PuLP calls a time-out "Optimal": only sol_status tells them apart.
        return {
            pulp.LpSolutionOptimal: "optimal",
            pulp.LpSolutionIntegerFeasible: "feasible",
            pulp.LpSolutionInfeasible: "infeasible",
        }.get(self._problem.sol_status, "unsolved")  # type: ignore[return-value]

    def objective(self) -> float:
        return float(pulp.value(self._problem.objective)) / self._scale

    def rounded(self, tables: Sequence[Cost]) -> NDArray[np.int64]:
        """The relaxation with each fractional unit at the cheapest of its fractions."""
        value = np.zeros(self._shape)
        for x, at in zip(self._x, self._at, strict=True):
            value[at] = x.varValue or 0.0
        price = sum((cost.table / max(cost.largest, 1e-300) for cost in tables), np.zeros(self._shape))
        cheapest: NDArray[np.int64] = np.where(value > 1e-6, price, np.inf).argmin(axis=1).astype(np.int64)
        return cheapest

    def reduced_costs(self) -> NDArray[np.float64]:
        """In units of the loss; 0 for closed choices."""
        reduced = np.zeros(self._shape)
        for x, at in zip(self._x, self._at, strict=True):
            reduced[at] = (x.dj or 0.0) / self._scale
        return reduced

    def choice(self) -> NDArray[np.int64] | None:
        chosen = np.zeros(self._shape)
        for x, at in zip(self._x, self._at, strict=True):
            chosen[at] = x.varValue or 0.0
        if not np.allclose(chosen.sum(axis=1), 1, atol=1e-4) or (np.abs(chosen - chosen.round()) > 1e-4).any():
            return None
        choice: NDArray[np.int64] = chosen.argmax(axis=1).astype(np.int64)
        return choice
