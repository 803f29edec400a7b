"""The squared rounding error of each layer's weight, which several metrics multiply, and what it is relative to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from search.inventory import by_whole
from search.scheme import FULL_PRECISION, Scheme
from search.space import Space, Unit
from workers.evaluator import Evaluator
from workers.tasks import Compute, Item, Result, Task


def weight_only(scheme: Scheme) -> str:
    """The scheme with the same weights and activations as they are, by name."""
    return str(replace(scheme, activation_bits=16))


def weight_schemes(space: Space) -> list[str]:
    """The names of all ways to round weights in a space, activations apart."""
    return sorted({weight_only(scheme) for scheme in space.schemes if scheme.quantizes_weights})


def rounding_errors(compute: Compute, space: Space) -> dict[str, Result]:
    """Layer or part → scheme (by name, of weights only) → ‖Q(W) − W‖², for all schemes that fit the layer."""
    layers, schemes = by_whole(layer.name for layer in space.layers), weight_schemes(space)
    items: list[Item] = [{"layers": names, "schemes": schemes} for names in layers.values()]
    return {name: errors for result in compute(ROUNDING_ERROR, items) for name, errors in result.items()}


def relative_errors(compute: Compute, space: Space) -> NDArray[np.float64]:
    """‖Q(W) − W‖² / ‖W‖² of every unit at every scheme (units × schemes); NaN where a scheme does not round the weights
    or does not fit them."""
    errors = rounding_errors(compute, space)
    items: list[Item] = [{"layers": names} for names in by_whole(errors).values()]
    squares = {name: square for result in compute(SQUARE, items) for name, square in result.items()}

    def relative(unit: Unit, scheme: Scheme) -> float:
        names, text = [layer.name for layer in unit.layers], weight_only(scheme)
        if not all(text in errors[name] for name in names):
            return np.nan
        square = sum(squares[name] for name in names)
        return sum(errors[name][text] for name in names) / square if square else np.nan

    return np.array([[relative(unit, scheme) for scheme in space.schemes] for unit in space.units])


def _rounding_error(evaluator: Evaluator, item: Item) -> Result:
    columns = evaluator.layers[item["layers"][0]].layer.columns
    schemes = [scheme for text in item["schemes"] if (scheme := Scheme.parse(text)).fits(columns)]
    return {
        name: {str(scheme): evaluator.rounding_error(name, scheme) for scheme in schemes} for name in item["layers"]
    }


def _square(evaluator: Evaluator, item: Item) -> Result:
    return {name: float(evaluator.weight(name, FULL_PRECISION).double().square().sum()) for name in item["layers"]}


ROUNDING_ERROR = Task("rounding_error", 2, _rounding_error, uses_data=False)
"""Item: a layer, or parts of one (`layers`), and weight schemes. Result: layer or part → scheme → ‖Q(W) − W‖²."""

SQUARE = Task("square", 1, _square, uses_data=False)
"""Item: a layer, or parts of one (`layers`). Result: layer or part → ‖W‖²."""
