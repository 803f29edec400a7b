"""The squared rounding error of each layer's weight, which several metrics multiply."""

from __future__ import annotations

from dataclasses import replace

from search.scheme import Scheme
from search.space import Space
from workers.evaluator import Evaluator
from workers.tasks import Compute, Item, Result, Task


def weight_only(scheme: Scheme) -> str:
    """The scheme with the same weights and activations as they are, by name."""
    return str(replace(scheme, activation_bits=16))


def weight_schemes(space: Space) -> list[str]:
    """The names of all ways to round weights in a space, activations apart."""
    return sorted({weight_only(scheme) for scheme in space.schemes if scheme.quantizes_weights})


def rounding_errors(compute: Compute, space: Space) -> dict[str, Result]:
    """Layer → scheme (by name, of weights only) → ‖Q(W) − W‖², for all schemes that fit the layer."""
    items = [{"layer": layer.name, "schemes": weight_schemes(space)} for layer in space.layers]
    return dict(zip([layer.name for layer in space.layers], compute(ROUNDING_ERROR, items), strict=True))


def _rounding_error(evaluator: Evaluator, item: Item) -> Result:
    columns = evaluator.layers[item["layer"]].layer.columns
    schemes = [scheme for text in item["schemes"] if (scheme := Scheme.parse(text)).fits(columns)]
    return {str(scheme): evaluator.rounding_error(item["layer"], scheme) for scheme in schemes}


ROUNDING_ERROR = Task("rounding_error", 1, _rounding_error, uses_data=False)
"""Item: a layer and weight schemes. Result: scheme → ‖Q(W) − W‖²."""
