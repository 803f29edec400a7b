"""Within what a budget can mean anything, and whether budgets can be met at all; where not, which of them contradict
each other and what each could be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search.budget import BUDGETS, TOLERANCE, Bound
from search.cost import Cost, Resource
from search.errors import InfeasibleBudget
from search.ilp import solve
from search.knapsack import Solution
from search.space import Space


@dataclass(frozen=True, slots=True)
class Range:
    """What configurations cost at least and at most, and those that give every unit one scheme, by that; in the units
    of the budget. A budget below `least` is infeasible, one of `most` or more bounds nothing."""

    least: float
    most: float
    uniform: dict[str, float]


def feasible_ranges(space: Space, costs: Mapping[Resource, Cost]) -> dict[str, Range]:
    """Budget → range, of the resources that are counted, to six digits and never below the true ones."""
    uniform = {str(scheme): choice for scheme in space.schemes if (choice := space.uniform(scheme)) is not None}

    def range_of(cost: Cost, scale: float) -> Range:
        totals = {scheme: _rounded_up(cost.total(choice) / scale) for scheme, choice in uniform.items()}
        return Range(_rounded_up(cost.smallest / scale), _rounded_up(cost.largest / scale), totals)

    counted = {name: unit for name, unit in BUDGETS.items() if unit.resource in costs}
    return {name: range_of(costs[unit.resource], unit.scale) for name, unit in counted.items()}


def check_feasible(costs: Mapping[Resource, Cost], bounds: Sequence[Bound]) -> None:
    """Refuse a bound that lies below what its resource can reach, and bounds that no allocation meets together.

    Raises InfeasibleBudget, in the budgets' own units: with the smallest feasible value of each such; or with a minimal
    set of those that contradict each other (without any of them the others can be met) and the smallest value of each
    that the other budgets leave.
    """
    _check_alone(costs, bounds)
    if _can_hold(costs, bounds):
        return
    conflict = minimal_conflict(costs, bounds)
    minimum = {
        bound.name: value
        for bound in conflict
        if (value := _smallest_value(costs, bound, bounds, conflict)) is not None
    }
    raise InfeasibleBudget(
        "each of these budgets can be met alone, but no allocation meets all: "
        + ", ".join(f"{name} ≥ {value:g} while the others hold" for name, value in minimum.items()),
        field="budgets",
        value={bound.name: bound.value(bound.limit) for bound in conflict},
        accepted={"minimum_given_the_others": minimum},
    )


def minimal_conflict(costs: Mapping[Resource, Cost], bounds: Sequence[Bound]) -> list[Bound]:
    """Of bounds that cannot hold together, some that cannot either, but can without any one of them.

    The deletion filter (Chinneck & Dravnieks 1991): each is left out in turn, for good where the others still conflict.
    """
    conflict = list(bounds)
    for bound in bounds:
        others = [other for other in conflict if other is not bound]
        if not _can_hold(costs, others):
            conflict = others
    return conflict


def _check_alone(costs: Mapping[Resource, Cost], bounds: Sequence[Bound]) -> None:
    below = {bound.name: bound for bound in bounds if not bound.admits(costs[bound.resource].smallest)}
    if not below:
        return
    least = {name: _rounded_up(bound.value(costs[bound.resource].smallest)) for name, bound in below.items()}
    value = {name: bound.value(bound.limit) for name, bound in below.items()}
    told = [
        f"{name} = {value[name]:g} is below what this space can reach; the smallest feasible value is "
        f"{least[name]:g} {BUDGETS[bound.budget].unit}"
        for name, bound in below.items()
    ]
    name, *others = below
    raise InfeasibleBudget(
        "; and ".join(told),
        field="budgets" if others else f"budgets.{name}",
        value=value if others else value[name],
        accepted={"minimum": least if others else least[name]},
    )


def _can_hold(costs: Mapping[Resource, Cost], bounds: Sequence[Bound]) -> bool:
    """Whether some allocation keeps all bounds; also where that stays open within the time limit."""
    return _within(costs, bounds).status != "infeasible"


def _smallest_value(
    costs: Mapping[Resource, Cost], bound: Bound, bounds: Sequence[Bound], conflict: Sequence[Bound]
) -> float | None:
    """What a bound of the conflict must at least be while all others hold; where these conflict too, those of the
    conflict. None where the time limit leaves that open."""
    for others in (bounds, conflict):
        least = _within(costs, [other for other in others if other is not bound], minimise=bound.resource)
        if least.choice is not None:
            return _rounded_up(bound.value(least.objective))
    return None


def _within(costs: Mapping[Resource, Cost], bounds: Sequence[Bound], minimise: Resource = "loss") -> Solution:
    """An allocation that keeps the bounds, all of which lose nothing."""
    return solve(np.zeros_like(next(iter(costs.values())).table), costs, bounds, minimise=minimise)


def _rounded_up(value: float, digits: int = 6) -> float:
    """`value` to `digits` significant digits, never below it."""
    if value == 0:
        return 0.0
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(abs(value))))
    return math.ceil(value * scale - TOLERANCE) / scale
