"""An allocation: a scheme for every unit, and what it says of every layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from search.scheme import FULL_PRECISION, Scheme
from search.space import Space

LayerSchemes = dict[str, Scheme]
"""Layer name → scheme, searched layers only."""


def layer_schemes(space: Space, choice: NDArray[np.int64]) -> LayerSchemes:
    """Spread the units' choice (a scheme index for every unit) over their layers."""
    return {
        layer.name: space.schemes[column]
        for unit, column in zip(space.units, choice, strict=True)
        for layer in unit.layers
    }


def digest(allocation: Mapping[str, Scheme]) -> str:
    """Content key of an allocation: layers at full precision do not count, so spaces that differ in them agree."""
    rounded = {name: str(scheme) for name, scheme in allocation.items() if scheme != FULL_PRECISION}
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def to_json(allocation: Mapping[str, Scheme]) -> dict[str, str]:
    """Layer name → scheme text."""
    return {name: str(scheme) for name, scheme in allocation.items()}


def from_json(document: Mapping[str, str]) -> LayerSchemes:
    """The inverse of `to_json`."""
    return {name: Scheme.parse(text) for name, text in document.items()}
