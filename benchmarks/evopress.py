"""EvoPress (Sieberling et al., 2410.14649), written from the paper: a rival of our own search, not a part of it.

A (1 + λ) evolution at a fixed budget. Offspring are mutated by level switches, some units a level up and others down,
and selected in steps: many on little data, the survivors on more, the last with the parent on all. λ = 128, and 16, 4
and 1 survivors on 2 048, 16 384 and 131 072 tokens, are its authors' settings for quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Choice = NDArray[np.int64]
Floats = NDArray[np.float64]

OFFSPRING = 128
SURVIVORS = (16, 4, 1)
FRACTIONS = (1 / 64, 1 / 8, 1.0)
"""Of the data that a step measures on."""

MOST_SWITCHES = 3
TRIES = 10
"""So many mutations are drawn for each of the offspring: near the ends of a small space many are the same."""


def evopress(
    loss_of: Callable[[Choice, float], float],
    start: Choice,
    cost: Floats,
    limit: float,
    evaluations: float,
    generator: np.random.Generator,
    *,
    offspring: int = OFFSPRING,
    survivors: Sequence[int] = SURVIVORS,
    fractions: Sequence[float] = FRACTIONS,
) -> list[tuple[Choice, float]]:
    """The choices that were measured on all data, with their losses, `start` first.

    `loss_of(choice, fraction)` is the loss on a fraction of the data. `cost` is units × schemes, inf where closed; its
    total is at most `limit`, for `start` too. `evaluations` are full ones: a measurement on a fraction is charged as
    one. It ends when a generation is more than what is left, or nothing new is drawn. Nothing is measured on all data
    twice.
    """
    levels = _levels(cost)
    measured = [(start, loss_of(start, 1.0))]
    left = evaluations - 1.0
    parent = start
    while True:
        known = {choice.tobytes() for choice, _ in measured}
        pool = _offspring(parent, known, levels, cost, limit, offspring, generator)
        counts = [len(pool), *(min(len(pool), kept) for kept in survivors[:-1])]
        price = sum(count * fraction for count, fraction in zip(counts, fractions, strict=True))
        if not pool or price > left + 1e-9:
            return measured
        left -= price
        for kept, fraction in zip(survivors, fractions, strict=True):
            losses = [loss_of(choice, fraction) for choice in pool]
            if fraction == 1.0:
                measured += zip(pool, losses, strict=True)
            pool = [pool[at] for at in np.argsort(losses, kind="stable")[:kept]]
        parent = min(measured, key=lambda one: one[1])[0]


def _offspring(
    parent: Choice,
    known: set[bytes],
    levels: Sequence[Choice],
    cost: Floats,
    limit: float,
    count: int,
    generator: np.random.Generator,
) -> list[Choice]:
    found: dict[bytes, Choice] = {}
    for _ in range(TRIES * count):
        child = _switched(parent, levels, cost, limit, generator)
        if child is not None and child.tobytes() not in known:
            found.setdefault(child.tobytes(), child)
        if len(found) == count:
            break
    return list(found.values())


def _switched(
    parent: Choice, levels: Sequence[Choice], cost: Floats, limit: float, generator: np.random.Generator
) -> Choice | None:
    """Some units a level up, and others a level down until the limit is kept; None where that cannot be."""
    child, rows = parent.copy(), np.arange(len(parent))
    # The smaller of two draws: few switches are more often better.
    for _ in range(generator.integers(1, MOST_SWITCHES + 1, size=2).min()):
        _step(child, +1, levels, rows, generator)
    raised = child != parent
    while cost[rows, child].sum() > limit * (1 + 1e-9):
        if not _step(child, -1, levels, rows[~raised], generator):
            return None
    return child


def _step(
    choice: Choice, by: int, levels: Sequence[Choice], units: NDArray[np.int64], generator: np.random.Generator
) -> bool:
    """Move one of `units` by a level, in place; False where none can."""
    at = {int(unit): int(np.flatnonzero(levels[unit] == choice[unit])[0]) + by for unit in units}
    can = [unit for unit, level in at.items() if 0 <= level < len(levels[unit])]
    if can:
        unit = generator.choice(can)
        choice[unit] = levels[unit][at[unit]]
    return bool(can)


def _levels(cost: Floats) -> list[Choice]:
    """The open schemes of every unit, from the cheapest."""
    return [np.flatnonzero(np.isfinite(row))[row[np.isfinite(row)].argsort(kind="stable")] for row in cost]
