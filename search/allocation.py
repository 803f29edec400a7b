"""An allocation: a scheme for every unit, and what it says of every layer.

Where output channels of a layer differ, each group of them is named as a part of the layer, `model.head[0:128]` being
its first 128 output channels (rows of its weight); what no name stands for keeps full precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from search.inventory import Layer, by_whole
from search.scheme import FULL_PRECISION, Scheme
from search.space import Space

LayerSchemes = dict[str, Scheme]
"""Layer name, or name of a part of it → scheme, searched layers only."""


def layer_schemes(space: Space, choice: NDArray[np.int64]) -> LayerSchemes:
    """Spread the units' choice (a scheme index for every unit) over their layers."""
    return {
        layer.name: space.schemes[column]
        for unit, column in zip(space.units, choice, strict=True)
        for layer in unit.layers
    }


def placed(allocation: Mapping[str, Scheme], layers: Iterable[Layer]) -> list[tuple[Layer, Scheme]]:
    """What an allocation says of `layers`, in their order: each that it names, with its scheme; of a layer whose output
    channels take several, its parts with theirs."""
    names = by_whole(allocation)
    found = []
    for layer in layers:
        parts = [(layer.named(name), allocation[name]) for name in names.get(layer.name, ())]
        alike = len({scheme for _, scheme in parts}) == 1 and sum(part.rows for part, _ in parts) == layer.rows
        found += [(layer, parts[0][1])] if alike else parts
    return found


def digest(allocation: Mapping[str, Scheme]) -> str:
    """Content key of an allocation: layers at full precision do not count, so spaces that differ in them agree."""
    rounded = {name: str(scheme) for name, scheme in allocation.items() if scheme != FULL_PRECISION}
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def to_json(allocation: Mapping[str, Scheme]) -> dict[str, str]:
    """Layer or part name → scheme text."""
    return {name: str(scheme) for name, scheme in allocation.items()}


def from_json(document: Mapping[str, str]) -> LayerSchemes:
    """The inverse of `to_json`."""
    return {name: Scheme.parse(text) for name, text in document.items()}
