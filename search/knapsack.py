"""One budget, exactly: the multiple-choice knapsack, for one capacity or for a whole frontier of them.

    min Σ_u loss_u,s(u)   such that   Σ_u cost_u,s(u) ≤ capacity

The linear relaxation is solved for all capacities at once: of each unit only the lower convex hull of its (cost, loss)
points matters, and the hulls' steps are taken steepest first (Sinha & Zoltners 1979). At most one unit is split between
two schemes, so that the relaxation is near; the integer optimum differs from it in few units, which dynamic programming
enumerates (Pisinger 1995).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from search.switches import Choice, Floats, filled

Status = Literal["optimal", "feasible", "infeasible", "unsolved"]

GAP = 1e-6
"""Relative gap to the proved bound below which a solution counts as optimal, unless another is asked for."""

MOST_STATES = 200_000
"""Dynamic programming gives up beyond: what it has found stands, with its gap."""


@dataclass(frozen=True, slots=True)
class Solution:
    """`choice` (None when there is none), its `objective` (the total minimised: the predicted loss, unless a cost was),
    and the proved lower `bound` on any choice's.

    `status` is "optimal" only when proved to the gap asked for; "feasible" when the search ended before; "unsolved"
    when it ended before any allocation was found, which says nothing about feasibility.
    """

    status: Status
    choice: Choice | None = None
    objective: float = float("nan")
    bound: float = float("nan")

    @property
    def gap(self) -> float:
        """How far above the bound the objective may be, relative to the bound."""
        return (self.objective - self.bound) / max(abs(self.bound), 1e-300)


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The linear relaxation's least loss as a function of the capacity: convex, with breakpoints `costs`, `losses`.

    The first breakpoint is the cheapest allocation, `start`; step k, from breakpoint k to k + 1, gives `units[k]` the
    scheme `schemes[k]`.
    """

    start: Choice
    units: Choice
    schemes: Choice
    costs: Floats
    losses: Floats

    def at(self, capacity: float) -> int:
        """The last breakpoint within the capacity; −1 when there is none."""
        return int(np.searchsorted(self.costs, capacity, side="right")) - 1

    def price(self, capacity: float) -> float:
        """How much less loss one more unit of capacity buys; 0 where everything is bought."""
        k = self.at(capacity)
        if k + 1 == len(self.costs):
            return 0.0
        return float((self.losses[k] - self.losses[k + 1]) / (self.costs[k + 1] - self.costs[k]))

    def bound(self, capacity: float) -> float:
        """The least loss that fractions of schemes would have; inf below the cheapest allocation."""
        k = self.at(capacity)
        return float(self.losses[k] - self.price(capacity) * (capacity - self.costs[k])) if k >= 0 else float("inf")

    def choice(self, k: int) -> Choice:
        """The allocation of breakpoint k."""
        choice = self.start.copy()
        # Of several steps of a unit the last one stands.
        choice[self.units[:k]] = self.schemes[:k]
        return choice


def open_choices(tables: Mapping[str, Floats]) -> NDArray[np.bool_]:
    """Which choices are open: those that no table, units × schemes, closes with an inf.

    Raises ValueError for a table that has NaN or −inf for an open one, with its unit and scheme.
    """
    open_: NDArray[np.bool_] = ~np.any([table == np.inf for table in tables.values()], axis=0)
    for name, table in tables.items():
        for unit, scheme in np.argwhere(open_ & ~np.isfinite(table)):
            raise ValueError(
                f"the {name} of unit {unit} at scheme {scheme} is {table[unit, scheme]}; "
                "accepted: a number, or inf where the choice is closed"
            )
    return open_


def relax(loss: Floats, cost: Floats) -> Relaxation:
    """The relaxation of units × schemes losses and costs; a choice is closed where either is inf.

    Every unit has an open choice.
    """
    rows = np.arange(len(loss))
    open_ = open_choices({"loss": loss, "cost": cost})
    loss, cost = np.where(open_, loss, np.inf), np.where(open_, cost, np.inf)
    cheapest = cost.min(axis=1, keepdims=True)
    start = np.where(cost == cheapest, loss, np.inf).argmin(axis=1)

    now, steepest = start.copy(), np.full(len(loss), np.inf)
    found: list[tuple[Choice, Choice, Floats, Floats, Floats]] = []
    while True:
        extra = cost - cost[rows, now][:, None]
        saved = loss[rows, now][:, None] - loss
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            slopes = np.where((extra > 0) & (saved > 0) & open_, saved / extra, 0.0)
        best = slopes.max(axis=1)
        moving = np.flatnonzero(best > 0)
        if not len(moving):
            break
        # Of points on one line the nearest: more breakpoints lie closer to any capacity.
        to = np.where(slopes == best[:, None], extra, np.inf).argmin(axis=1)[moving]
        # Rounding must not let a unit's second step come before its first.
        steepest[moving] = np.minimum(steepest[moving], best[moving])
        found.append((moving, to, extra[moving, to], saved[moving, to], steepest[moving]))
        now[moving] = to

    units, schemes, extra, saved, slopes = (
        (np.concatenate(part) for part in zip(*found, strict=True)) if found else (np.zeros(0, np.int64),) * 5
    )
    order = np.argsort(-slopes, kind="stable")
    return Relaxation(
        start,
        units[order],
        schemes[order],
        cost[rows, start].sum() + np.concatenate([[0.0], np.cumsum(extra[order])]),
        # Summed up from the least: a great loss at the start must not swallow the small ones at the end.
        loss[rows, now].sum() + np.append(np.cumsum(saved[order][::-1])[::-1], 0.0),
    )


def solve(
    loss: Floats,
    cost: Floats,
    capacity: float,
    *,
    relaxation: Relaxation | None = None,
    prove: bool = True,
    gap: float = GAP,
) -> Solution:
    """The choice of least loss within the capacity; `relaxation` is `relax(loss, cost)`, where it is known.

    It is proved to `gap`. Without `prove`, the relaxation rounded down and filled up: near at once, and its gap says
    how near. Raises ValueError as `open_choices` does.
    """
    if not open_choices({"loss": loss, "cost": cost}).any(axis=1).all():
        return Solution("infeasible")
    relaxation = relaxation or relax(loss, cost)
    k = relaxation.at(capacity)
    if k < 0:
        return Solution("infeasible")
    choice = filled(relaxation.choice(k), loss, cost[None], np.array([capacity]))
    bound = relaxation.bound(capacity)
    total = _total(loss, choice)
    if total - bound <= gap * abs(bound):
        return Solution("optimal", choice, total, min(bound, total))
    found = Solution("feasible", choice, total, bound)
    return _improved(found, loss, cost, capacity, relaxation.price(capacity), gap) if prove else found


def frontier(
    loss: Floats, cost: Floats, capacities: Iterable[float], *, prove: bool = True, gap: float = GAP
) -> list[Solution]:
    """`solve` for every capacity, from one relaxation."""
    if not open_choices({"loss": loss, "cost": cost}).any(axis=1).all():
        return [Solution("infeasible") for _ in capacities]
    relaxation = relax(loss, cost)
    return [solve(loss, cost, capacity, relaxation=relaxation, prove=prove, gap=gap) for capacity in capacities]


def _total(table: Floats, choice: Choice) -> float:
    return float(table[np.arange(len(choice)), choice].sum())


def _improved(known: Solution, loss: Floats, cost: Floats, capacity: float, price: float, gap: float) -> Solution:
    """The best choice, proved; after `MOST_STATES` the best found, with the bound as it was.

    With reduced losses r = loss + price·cost − their least of the unit, a choice's loss is bound + Σ r + price·room,
    room being what it leaves of the capacity. So no better choice takes an r beyond the gap, and few units have a
    second one below it. Partial choices of these are extended unit by unit: those which another betters in both cost
    and loss are dropped, and those whose bound lies beyond the best known.
    """
    assert known.choice is not None
    rows, bound = np.arange(len(loss)), known.bound
    open_ = np.isfinite(loss) & np.isfinite(cost)
    reduced = np.where(open_, loss + price * np.where(open_, cost, 0.0), np.inf)
    base = reduced.argmin(axis=1)
    reduced = reduced - reduced[rows, base][:, None]
    tolerance = gap * min(abs(bound), abs(known.objective))
    best, best_loss = known.choice, known.objective

    def within() -> float:
        return best_loss - bound - tolerance

    alternatives = (reduced < within()) & (np.arange(loss.shape[1]) != base[:, None])
    core = np.flatnonzero(alternatives.any(axis=1))
    core = core[np.argsort(np.where(alternatives, reduced, np.inf)[core].min(axis=1), kind="stable")]
    change = np.where(alternatives, cost - cost[rows, base][:, None], 0.0)[core]
    # What the units still to come can take from, or add to, a partial choice's cost.
    least = np.append(np.cumsum(change.min(axis=1).clip(max=0)[::-1])[::-1], 0.0)
    most = np.append(np.cumsum(change.max(axis=1).clip(min=0)[::-1])[::-1], 0.0)

    spent, above = np.array([_total(cost, base)]), np.zeros(1)
    layers: list[tuple[Choice, Choice]] = []
    for position, unit in enumerate(core):
        schemes = np.flatnonzero(alternatives[unit] & (reduced[unit] < within()))
        schemes = np.append(schemes, base[unit])
        count = len(spent)
        spent = (spent + (cost[unit, schemes] - cost[unit, base[unit]])[:, None]).ravel()
        above = (above + reduced[unit, schemes][:, None]).ravel()
        parent, taken = np.tile(np.arange(count), len(schemes)), np.repeat(schemes, count)

        room = capacity - spent
        forced = price * (room - most[position + 1]).clip(min=0)
        kept = np.flatnonzero((room >= least[position + 1]) & (above + forced < within()))
        # By cost, then by loss; what costs no less must lose less.
        kept = kept[np.lexsort((above[kept], spent[kept]))]
        losses = above[kept] - price * spent[kept]
        kept = kept[np.append(True, losses[1:] < np.minimum.accumulate(losses)[:-1])] if len(kept) else kept
        spent, above = spent[kept], above[kept]
        layers.append((parent[kept], taken[kept]))
        if not len(kept):
            break
        if len(kept) > MOST_STATES:
            return Solution("feasible", best, best_loss, bound)
        whole = np.where(spent <= capacity, above + price * (capacity - spent), np.inf)
        if whole.min() < within():
            best = _traced(base, core, layers, int(whole.argmin()))
            best_loss = _total(loss, best)
    return Solution("optimal", best, best_loss, max(bound, best_loss - tolerance))


def _traced(base: Choice, core: Choice, layers: list[tuple[Choice, Choice]], state: int) -> Choice:
    """The choice of a state of the last of the layers (parents and schemes of their states)."""
    choice = base.copy()
    for unit, (parent, taken) in zip(core[: len(layers)][::-1], reversed(layers), strict=True):
        choice[unit] = taken[state]
        state = int(parent[state])
    return choice
