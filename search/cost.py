"""What a choice costs in one resource: units × schemes tables that add up to a total."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.inventory import Inventory, Layer
from search.scheme import Scheme
from search.space import Space

Resource = str
"""`size_bytes`, `avg_bits`, `bitops` or `latency_us` of the model, or of some layers (`avg_bits of *.down_proj`);
`loss` where an integer program bounds it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Total = constant + Σ_u table[u, choice_u]; `table` is units × schemes, inf where a scheme is not allowed."""

    resource: Resource
    table: NDArray[np.float64]
    constant: float

    def total(self, choice: NDArray[np.int64]) -> float:
        """The cost of an allocation, given as a scheme index for every unit."""
        return float(self.constant + self.table[np.arange(len(choice)), choice].sum())

    @property
    def smallest(self) -> float:
        """The least total of the space."""
        return float(self.constant + self.table.min(axis=1).sum())

    @property
    def largest(self) -> float:
        """The greatest total of the space."""
        return float(self.constant + np.where(np.isfinite(self.table), self.table, -np.inf).max(axis=1).sum())


def cost_tables(space: Space, inventory: Inventory) -> dict[Resource, Cost]:
    """`size_bytes` (whole model, what is not searched at 16 bits), `avg_bits` (stored bits per searched weight, scales
    and zero points counted) and `bitops` (MACs × weight bits × activation bits of one token or image)."""
    bits = np.where(space.allowed, stored_bits(space), np.inf)
    bitops = np.where(
        space.allowed,
        _table(space, lambda layer, scheme: layer.macs * scheme.weight_bits * scheme.activation_bits),
        np.inf,
    )
    searched = sum(unit.weights for unit in space.units)
    unsearched_bytes = 2.0 * (inventory.parameters - searched)
    unsearched_bitops = float(sum(layer.macs * 16 * 16 for layer in space.ignored))
    return {
        "size_bytes": Cost("size_bytes", bits / 8, unsearched_bytes),
        "avg_bits": Cost("avg_bits", bits / searched, 0.0),
        "bitops": Cost("bitops", bitops, unsearched_bitops),
    }


def stored_bits(space: Space) -> NDArray[np.float64]:
    """Bits to store every unit at every scheme, whether it is allowed or not; units × schemes."""
    return _table(space, lambda layer, scheme: scheme.storage_bits(layer.rows, layer.columns))


def proportion(one: Cost, other: Cost) -> float | None:
    """What one's costs are multiplied by to give the other's, constants apart; None where no positive number does."""
    if one.resource == other.resource:
        return 1.0
    open_ = np.isfinite(one.table) & np.isfinite(other.table)
    a, b = one.table[open_], other.table[open_]
    largest = np.abs(a).argmax() if a.any() else None
    if largest is None or b[largest] / a[largest] <= 0:
        return None
    ratio = float(b[largest] / a[largest])
    return ratio if np.allclose(a * ratio, b, rtol=1e-12, atol=0) else None


def _table(space: Space, of_layer: Callable[[Layer, Scheme], int]) -> NDArray[np.float64]:
    return np.array(
        [
            [float(sum(of_layer(layer, scheme) for layer in unit.layers)) for scheme in space.schemes]
            for unit in space.units
        ]
    )
