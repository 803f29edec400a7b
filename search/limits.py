"""Limits: budgets on some of the layers, as bounds on tables that count these alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from search.budget import Bound, cost_bounds
from search.cost import Cost, Resource, cost_tables
from search.errors import InvalidRequest
from search.inventory import Inventory, Layer
from search.latency import Latency
from search.request import KIND, Budgets
from search.space import Space, matches


def costs_and_bounds(
    space: Space, inventory: Inventory, budgets: Budgets, latency: Latency | None = None
) -> tuple[dict[Resource, Cost], list[Bound]]:
    """What is bounded, and by how much: the tables of the whole model and its budgets, then those of the limits.

    Raises InvalidRequest for a limit whose pattern matches no searched layer, or only some of the layers of a unit; and
    where time counts, what `Latency.cost` raises.
    """
    costs, bounds = cost_tables(space, inventory), cost_bounds(budgets.named())
    if latency is not None:
        costs["latency_us"] = latency.cost(space)
    for pattern, limit in budgets.limits.items():
        members = _members(space, pattern)
        for whole, bound in zip(cost_bounds(limit.named()), cost_bounds(limit.named(), of=pattern), strict=True):
            costs[bound.resource] = _part(space, costs[whole.resource], members, bound.resource)
            bounds.append(bound)
    return costs, bounds


def _members(space: Space, pattern: str) -> NDArray[np.bool_]:
    """Which units a pattern names."""
    members = np.zeros(len(space.units), dtype=bool)
    for row, unit in enumerate(space.units):
        named = [layer for layer in unit.layers if _named(layer, pattern)]
        if named and len(named) < len(unit.layers):
            raise InvalidRequest(
                f"the limit on '{pattern}' counts {named[0].name}, but not all layers that must share its scheme",
                field=f"budgets.limits.{pattern}",
                value=pattern,
                accepted=f"a pattern that matches all of {', '.join(layer.name for layer in unit.layers)}, or none",
            )
        members[row] = bool(named)
    if not members.any():
        kinds = sorted({KIND + layer.kind for layer in space.layers})
        raise InvalidRequest(
            f"the limit on '{pattern}' matches no searched layer",
            field=f"budgets.limits.{pattern}",
            value=pattern,
            accepted=f"a glob over names such as {space.layers[0].name}, or {', '.join(kinds)}",
        )
    return members


def _named(layer: Layer, pattern: str) -> bool:
    return layer.kind == pattern.removeprefix(KIND) if pattern.startswith(KIND) else matches(layer, pattern)


def _part(space: Space, whole: Cost, members: NDArray[np.bool_], resource: Resource) -> Cost:
    """What some units take of a resource; an average is over their own weights."""
    table = np.where(space.allowed, np.where(members[:, None], whole.table, 0.0), np.inf)
    if whole.resource == "avg_bits":
        weights = np.array([unit.weights for unit in space.units])
        table = table * (weights.sum() / weights[members].sum())
    return Cost(resource, table, 0.0)
