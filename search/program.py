"""The integer program on arrays: one budget as a knapsack; several by prices, a core and PuLP with HiGHS (or CBC).

Prices give a bound, an allocation near it, and say what each choice loses above the bound: no better allocation takes a
choice beyond the gap, and a good one takes the cheapest of them. So the program is solved among few choices first (the
core, Balas & Zemel 1980), then among all that the better gap leaves.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pulp
from numpy.typing import NDArray

from search import knapsack
from search.knapsack import Solution, Status
from search.lagrangian import allocate, price
from search.switches import Choice, Floats

OBJECTIVE_SCALE = 1000.0
"""The program's objective is scaled to this: solvers stop at absolute tolerances, and losses may be far below 1."""

CORE = 320
CORE_SECONDS = 0.5
"""So many choices beside the best of each unit are the core, on which so much time is spent."""


def solve(within: Floats, costs: Floats, capacities: Floats, *, time_limit: float, prove: bool, gap: float) -> Solution:
    """The choice of least objective, units × schemes and inf where closed, within all capacities.

    `costs` are budgets × units × schemes. `time_limit`, `prove` and `gap` are those of `ilp.solve`.
    """
    open_ = np.isfinite(within)
    if (open_.sum(axis=1) == 1).all():
        only = open_.nonzero()[1]
        total = _total(within, only)
        return Solution("optimal", only, total, total) if _fits(only, costs, capacities) else Solution("infeasible")
    if len(capacities) < 2:
        # Without a budget, everything is within one that counts nothing.
        cost, capacity = (costs[0], capacities[0]) if len(capacities) else (np.zeros_like(within), 0.0)
        found = knapsack.solve(within, cost, capacity, prove=prove, gap=gap)
        if found.status != "feasible" or not prove:
            return found
    open_ &= ~_dominated(within, costs, open_)
    if not open_.any(axis=1).all():
        return Solution("infeasible")

    within = np.where(open_, within, np.inf)
    pricing = price(within, costs, capacities)
    if pricing.infeasible:
        return Solution("infeasible")
    tolerance = gap * abs(pricing.bound)
    known = Solution("unsolved", bound=pricing.bound)
    choice = allocate(pricing, within, np.where(open_, costs, np.inf), capacities)
    if choice is not None and _fits(choice, costs, capacities):
        known = _known(choice, within, pricing.bound, tolerance)
        if known.status == "optimal" or not prove:
            return known
        most = len(within) + CORE
        if (pricing.reduced <= known.objective - pricing.bound).sum() > most:
            core = pricing.reduced <= np.partition(pricing.reduced, most, axis=None)[most]
            found = _explored(known, core, within, costs, capacities, CORE_SECONDS, tolerance)
            known = _known(found.choice, within, pricing.bound, tolerance)
            if known.status == "optimal":
                return known
        open_ &= pricing.reduced <= known.objective - pricing.bound + tolerance
    return _explored(known, open_, within, costs, capacities, time_limit, tolerance)


def _known(choice: Choice | None, within: Floats, bound: float, tolerance: float) -> Solution:
    """What the bound says of a choice."""
    assert choice is not None
    total = _total(within, choice)
    return Solution("optimal" if total - bound <= tolerance else "feasible", choice, total, min(bound, total))


def _explored(
    known: Solution,
    among: NDArray[np.bool_],
    within: Floats,
    costs: Floats,
    capacities: Floats,
    seconds: float,
    tolerance: float,
) -> Solution:
    """The better of what is known and what the program finds among some choices; optimal where it is among these."""
    if known.choice is not None:
        among[np.arange(len(known.choice)), known.choice] = True
    status, choice = _Program(within, among, costs, capacities).solve(seconds, tolerance)
    if choice is None or not _fits(choice, costs, capacities):
        return Solution(status) if known.choice is None and status == "infeasible" else known
    total = _total(within, choice)
    if known.choice is not None and known.objective < total:
        choice, total = known.choice, known.objective
    bound = max(known.bound, total - tolerance) if status == "optimal" else known.bound
    return Solution(status, choice, total, min(bound, total))


def _total(table: Floats, choice: Choice) -> float:
    return float(table[np.arange(len(choice)), choice].sum())


def _fits(choice: Choice, costs: Floats, capacities: Floats) -> bool:
    return bool((costs[:, np.arange(len(choice)), choice].sum(axis=1) <= capacities).all())


def _dominated(within: Floats, costs: Floats, open_: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Choices that another open one of the same unit equals or betters in the objective and every bounded cost."""
    objectives = np.where(open_, np.concatenate([within[None], costs]), np.inf)
    dominated = np.zeros_like(open_)
    columns = within.shape[1]
    for one in range(columns):
        for other in range(columns):
            if one == other:
                continue
            no_worse = (objectives[:, :, other] <= objectives[:, :, one]).all(axis=0) & open_[:, other]
            better = (objectives[:, :, other] < objectives[:, :, one]).any(axis=0)
            dominated[:, one] |= no_worse & (better | (other < one))
    return dominated


STATUSES: dict[int, Status] = {
    pulp.LpSolutionOptimal: "optimal",
    pulp.LpSolutionIntegerFeasible: "feasible",
    pulp.LpSolutionInfeasible: "infeasible",
}


class _Program:
    """A PuLP problem over the units that have several open choices, its objective and budgets scaled for the solver."""

    def __init__(self, within: Floats, open_: NDArray[np.bool_], costs: Floats, capacities: Floats) -> None:
        self._settled = open_.argmax(axis=1)
        units = np.flatnonzero(open_.sum(axis=1) > 1)
        self._at = [(int(u), int(s)) for u in units for s in np.flatnonzero(open_[u])]
        self._problem = pulp.LpProblem("allocation", pulp.LpMinimize)
        self._x = [self._problem.add_variable(f"x_{u}_{s}", cat=pulp.LpBinary) for u, s in self._at]
        # Only differences matter: those of each unit from its least.
        losses = np.array([within[u, s] - within[u, open_[u]].min() for u, s in self._at])
        self._scale = OBJECTIVE_SCALE / max(losses.max(initial=0.0), 1e-300)
        self._problem += self._sum(losses * self._scale)
        for _, row in groupby(zip(self._x, self._at, strict=True), lambda pair: pair[1][0]):
            self._problem += pulp.LpAffineExpression((x, 1) for x, _ in row) == 1
        others = np.setdiff1d(np.arange(len(within)), units)
        self._rooms = capacities - costs[:, others, self._settled[others]].sum(axis=1)
        for cost, room in zip(costs, self._rooms, strict=True):
            changes = np.array([cost[at] for at in self._at])
            # In thousandths of the costs that are still open, so that feasibility tolerances are relative to them.
            scale = 1000 / max(np.abs(changes).max(initial=0.0), abs(room), 1e-300)
            self._problem += self._sum(changes * scale) <= room * scale

    def _sum(self, factors: Floats) -> pulp.LpAffineExpression:
        return pulp.LpAffineExpression((x, float(factor)) for x, factor in zip(self._x, factors, strict=True))

    def solve(self, seconds: float, tolerance: float) -> tuple[Status, Choice | None]:
        """The choice found, and whether it is within the tolerance of the best; None where nothing integral was."""
        if not self._x:
            return ("optimal", self._settled) if (self._rooms >= 0).all() else ("infeasible", None)
        limits = {"msg": False, "timeLimit": seconds, "gapRel": 0.0, "gapAbs": tolerance * self._scale, "threads": 1}
        status: Status = "unsolved"
        # CBC is second: where HiGHS is not installed, or ends with nothing.
        for kind, more in ((pulp.HiGHS, {"mip_feasibility_tolerance": 1e-9}), (pulp.PULP_CBC_CMD, {})):
            solver = kind(**limits, **more)
            if not solver.available():
                continue
            self._problem.solve(solver)
            # PuLP calls a time-out "Optimal": only sol_status tells them apart.
            status = STATUSES.get(self._problem.sol_status, "unsolved")
            if status == "infeasible":
                return status, None
            if status in ("optimal", "feasible") and (choice := self._choice()) is not None:
                return status, choice
        return status, None

    def _choice(self) -> Choice | None:
        """The schemes chosen; None where the solver's answer is not integral."""
        choice: Choice = self._settled.copy()
        for x, (unit, scheme) in zip(self._x, self._at, strict=True):
            if abs((x.varValue or 0.0) - round(x.varValue or 0.0)) > 1e-4:
                return None
            if (x.varValue or 0.0) > 0.5:
                choice[unit] = scheme
        return choice
