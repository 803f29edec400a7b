"""Where the bytes and the microseconds of an allocation go, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from search.allocation import from_json, placed
from search.inventory import Inventory, Layer, whole_and_channels
from search.latency import Latency
from search.scheme import FULL_PRECISION, Scheme


@dataclass(frozen=True, slots=True)
class Spent:
    """What a layer, or a part of one, costs at its scheme; `latency_us` is None where no profile has its product.

    `code_bytes` are its weights, `scale_bytes` their scales and zero points.
    """

    layer: Layer
    scheme: Scheme
    code_bytes: float
    scale_bytes: float
    latency_us: float | None

    @property
    def kind(self) -> str:
        """What layers of other blocks share with it: its name within its block, or its whole name."""
        whole, _ = whole_and_channels(self.layer.name)
        return whole.removeprefix(f"{self.layer.block}.") if self.layer.block else whole

    @property
    def size_bytes(self) -> float:
        """All it takes to store it."""
        return self.code_bytes + self.scale_bytes


@dataclass(frozen=True, slots=True)
class Spending:
    """Every layer in network order, and the `other_bytes` of what is no layer (norms, biases, positions)."""

    layers: tuple[Spent, ...]
    other_bytes: float

    @property
    def size_bytes(self) -> float:
        """The whole model."""
        return sum(spent.size_bytes for spent in self.layers) + self.other_bytes

    @property
    def latency_us(self) -> float | None:
        """A pass through all layers; None where the time of one is not known."""
        times = [spent.latency_us for spent in self.layers]
        known = [time for time in times if time is not None]
        return sum(known) if known and len(known) == len(times) else None


def spending(allocation: Mapping[str, str], inventory: Inventory, latency: Latency | None = None) -> Spending:
    """What an allocation (as a candidate has it) spends on each layer of the model; the sums are those of
    `search.cost.cost_tables` and of `Latency.cost`. Layers that were not searched are kept in 16 bits."""
    taken = placed(from_json(allocation), inventory.layers)
    named = {whole_and_channels(layer.name)[0] for layer, _ in taken}
    kept = [(layer, FULL_PRECISION) for layer in inventory.layers if layer.name not in named]
    order = {layer.name: place for place, layer in enumerate(inventory.layers)}
    pairs = sorted(taken + kept, key=lambda pair: order[whole_and_channels(pair[0].name)[0]])
    layers = tuple(_spent(layer, scheme, latency) for layer, scheme in pairs)
    weights = sum(spent.layer.weights for spent in layers)
    return Spending(layers, 2.0 * (inventory.parameters - weights))


def _spent(layer: Layer, scheme: Scheme, latency: Latency | None) -> Spent:
    codes = layer.weights * scheme.weight_bits
    scales = scheme.storage_bits(layer.rows, layer.columns) - codes
    return Spent(layer, scheme, codes / 8, scales / 8, latency.median(layer, scheme) if latency else None)
