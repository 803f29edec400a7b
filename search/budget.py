"""Budgets: hard upper bounds on total costs, under the names and in the units that a person uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    "latency_ms": BudgetUnit("latency_us", 1e3, "ms"),
    "loss_increase": BudgetUnit("loss", 1.0, "measured loss"),
}

# Budgets are written in decimal: 4.25 must admit a sum of float64 terms that is 4.25 but for rounding.
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound on one resource, under the name the person used; `of` is the pattern of a limit on some layers."""

    budget: str
    resource: Resource
    limit: float
    of: str | None = None

    def admits(self, total: float) -> bool:
        """Whether a total cost fits."""
        return total <= self.limit + TOLERANCE * abs(self.limit)

    def capacity(self, cost: Cost) -> float:
        """What it leaves for the units. It uses half the tolerance: rounding takes no total beyond what is admitted."""
        return self.limit + TOLERANCE / 2 * abs(self.limit) - cost.constant

    @property
    def name(self) -> str:
        """Where it stands in the request, below `budgets`."""
        return self.budget if self.of is None else f"limits.{self.of}.{self.budget}"

    def value(self, total: float) -> float:
        """A total cost in the unit the person used."""
        return total / BUDGETS[self.budget].scale


def cost_bounds(budgets: Mapping[str, float], of: str | None = None) -> list[Bound]:
    """The bounds on costs among `budgets` (by the names of `BUDGETS`), in the units of the cost tables.

    With a pattern, on what the layers `of` it cost together.
    """
    return [
        Bound(name, resource_of(BUDGETS[name].resource, of), value * BUDGETS[name].scale, of)
        for name, value in budgets.items()
        if name != "loss_increase"
    ]


def resource_of(resource: Resource, of: str | None) -> Resource:
    """The name of what the layers of a pattern take of a resource: `avg_bits of *.down_proj`."""
    return resource if of is None else f"{resource} of {of}"
