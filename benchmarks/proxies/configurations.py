"""Configurations of equal size: random ones, uneven by layer kind, by depth and by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

from search.cost import stored_bits
from search.space import Space

Choices = NDArray[np.int64]
"""Configurations × units: a scheme index for each."""

TOLERANCE = 0.001
"""Of a drawn configuration's stored bits, relative to its band's."""

NEAR = 0.005
"""The same where all configurations were enumerated and the bands lie where they are."""

PER_BAND = 51
BANDS_OF_ALL = 9


def sizes(space: Space, choices: Choices) -> NDArray[np.float64]:
    """Stored bits of each configuration."""
    total: NDArray[np.float64] = stored_bits(space)[np.arange(len(space.units)), choices].sum(axis=1)
    return total


def enumerate_all(space: Space) -> tuple[Choices, NDArray[np.float64]]:
    """Every configuration, and its band: the mean bits of a weight, or nan where it is in none."""
    choices = np.array(list(product(range(len(space.schemes)), repeat=len(space.units))))
    bits = sizes(space, choices) / sum(unit.weights for unit in space.units)
    bands = np.full(len(choices), np.nan)
    for centre in np.quantile(bits, np.linspace(0.1, 0.9, BANDS_OF_ALL)):
        bands[np.abs(bits / centre - 1) <= NEAR] = round(float(centre), 2)
    return choices, bands


def draw(space: Space, code_bits: tuple[float, ...], seed: int = 0) -> tuple[Choices, NDArray[np.float64]]:
    """PER_BAND different configurations for each mean number of bits of a code, and that number as their band."""
    generator = np.random.default_rng(seed)
    found = [
        (choice, bits) for bits in code_bits for choice in _different(_proposals(space, bits, generator), PER_BAND)
    ]
    return np.array([choice for choice, _ in found]), np.array([bits for _, bits in found])


def _different(proposals: Iterator[Choices], count: int) -> list[Choices]:
    seen: dict[bytes, Choices] = {}
    while len(seen) < count:
        choice = next(proposals)
        seen.setdefault(choice.tobytes(), choice)
    return list(seen.values())


def _proposals(space: Space, bits: float, generator: np.random.Generator) -> Iterator[Choices]:
    """Each layer wants `bits`, more or less by its kind, its depth and itself; how unevenly, and which of the three
    weighs most, differs between proposals."""
    widths = np.array([scheme.weight_bits for scheme in space.schemes], dtype=float)
    _, kinds = np.unique([re.sub(r"\d+", "#", unit.name) for unit in space.units], return_inverse=True)
    depth = np.linspace(-1, 1, len(space.units))
    while True:
        by_kind = generator.normal(size=kinds.max() + 1)[kinds]
        by_depth = np.polynomial.polynomial.polyval(depth, generator.normal(size=3))
        by_layer = generator.normal(size=len(space.units))
        shares = generator.dirichlet([0.7, 0.7, 0.7]) ** 0.5
        wanted = bits + generator.uniform(0.2, 2.0) * (shares @ np.array([by_kind, by_depth, by_layer]))
        choice = np.abs(wanted[:, None] - widths).argmin(axis=1)
        yield _of_size(space, choice, bits, generator)


def _of_size(space: Space, choice: Choices, bits: float, generator: np.random.Generator) -> Choices:
    """`choice` after random steps of single units to the next scheme, up or down, until its size is that of `bits`."""
    stored = stored_bits(space)
    units, weights = np.arange(len(choice)), sum(unit.weights for unit in space.units)
    # Scales cost the same at every scheme.
    goal = stored[:, 0].sum() + (bits - space.schemes[0].weight_bits) * weights
    while abs(excess := stored[units, choice].sum() - goal) > TOLERANCE * goal:
        after = choice + (-1 if excess > 0 else 1)
        possible = (after >= 0) & (after < stored.shape[1])
        change = stored[units, after.clip(0, stored.shape[1] - 1)] - stored[units, choice]
        better = possible & (np.abs(excess + change) < abs(excess))
        # Where every step overshoots, any one is taken, and the next ones come from the other side.
        moved = generator.choice(units[better if better.any() else possible])
        choice = np.where(units == moved, after, choice)
    return choice
