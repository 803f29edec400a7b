"""Latency profiles of made-up times, for tests of what is done with them."""

from collections.abc import Iterable

from search.inventory import Inventory
from search.latency import product
from search.latency_profile import CrossCheck, LatencyProfile, Quantiles, Shape, Times
from search.scheme import FULL_PRECISION, Scheme

DEVICE = "NVIDIA H100 80GB HBM3"


def microseconds(shape: Shape, scheme: Scheme) -> float:
    """Weights take their bits, activations theirs, and every launch 2 µs."""
    weights, tokens = shape.rows * shape.columns * scheme.weight_bits, shape.columns * shape.tokens
    return round(2 + weights / 1e4 + tokens * scheme.activation_bits / 1e4, 3)


def profile_of(
    inventory: Inventory, schemes: Iterable[str], tokens: Iterable[int] = (1,), device: str = DEVICE
) -> LatencyProfile:
    """Every product of a model in these schemes and w16a16, and a forward pass in w16a16."""
    shapes = {shape for layer in inventory.layers for count in tokens if (shape := product(layer, count))}
    kinds = {*map(Scheme.parse, schemes), FULL_PRECISION}
    times = {(shape, scheme): _times(microseconds(shape, scheme)) for shape in shapes for scheme in kinds}
    checks = {
        (inventory.digest, count, FULL_PRECISION): CrossCheck(80.0, Quantiles(99.0, 100.0, 130.0), True)
        for count in tokens
    }
    return LatencyProfile(
        device, "570.86, torch 2.11.0", "cupy", "a" * 64, "float16", "2026-11-22T12:00:00+00:00", times, checks
    )


def _times(median: float) -> Times:
    return Times(Quantiles(median / 2, median, median * 2), Quantiles(median * 3, median * 4, median * 5))
