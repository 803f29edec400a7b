"""Budgets: hard upper bounds on total costs, and the refusal of those that nothing can meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from search.errors import InfeasibleBudget

if TYPE_CHECKING:
    from search.cost import Cost, Resource


@dataclass(frozen=True, slots=True)
class BudgetUnit:
    """How a budget's unit maps to a resource: cost ≤ value × scale."""

    resource: str
    scale: float
    unit: str


# `loss_increase` bounds a measurement, not a cost: it has no resource table.
BUDGETS = {
    "avg_bits": BudgetUnit("avg_bits", 1.0, "bits per searched weight"),
    "size_mb": BudgetUnit("size_bytes", 1e6, "MB"),
    "gbitops": BudgetUnit("bitops", 1e9, "10⁹ bit operations"),
    "loss_increase": BudgetUnit("loss", 1.0, "measured loss"),
}

# Budgets are written in decimal: 4.25 must admit a sum of float64 terms that is 4.25 but for rounding.
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound on one resource, under the name the person used."""

    budget: str
    resource: Resource
    limit: float

    def admits(self, total: float) -> bool:
        """Whether a total cost fits."""
        return total <= self.limit * (1 + TOLERANCE)


def cost_bounds(budgets: dict[str, float]) -> list[Bound]:
    """The bounds on costs among `budgets` (by the names of `BUDGETS`), in the units of the cost tables."""
    return [
        Bound(name, BUDGETS[name].resource, value * BUDGETS[name].scale)  # type: ignore[arg-type]
        for name, value in budgets.items()
        if name != "loss_increase"
    ]


def check_feasible(bounds: list[Bound], costs: dict[Resource, Cost]) -> None:
    """Refuse each bound that lies below what its resource can reach alone.

    Raises InfeasibleBudget naming the smallest feasible value, in the budget's own unit.
    """
    for bound in bounds:
        smallest = costs[bound.resource].smallest
        if not bound.admits(smallest):
            unit = BUDGETS[bound.budget]
            feasible = _rounded_up(smallest / unit.scale)
            raise InfeasibleBudget(
                f"{bound.budget} = {bound.limit / unit.scale:g} is below what this space can reach; "
                f"the smallest feasible value is {feasible:g} {unit.unit}",
                field=f"budgets.{bound.budget}",
                value=bound.limit / unit.scale,
                accepted={"minimum": feasible},
            )


def _rounded_up(value: float, digits: int = 6) -> float:
    """`value` to `digits` significant digits, never below it."""
    quantum = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return math.ceil(value / quantum - TOLERANCE) * quantum
