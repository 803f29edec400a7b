"""A search by groups of output channels that begins with whole layers.

Few measurements tell of a few hundred layers which ones matter, and of thousands of groups next to nothing; but with
groups a layer may stand between two schemes. So a share of the evaluations goes to configurations in which every layer
has one scheme. What the best of them say is carried over as a factor on each layer's predictions: that nearest to 1 at
which the layer's scheme is its best at the prices of the budgets. All groups are then allocated at once by the
predictions that are so corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from search.expansion import Expansion
from search.ladders import Ladders
from search.prices import shadow_prices
from search.refinement import Refinement, Trial
from search.space import Space
from search.surrogate import Features
from search.sweep import Choice, Sweep, thinned

Floats = NDArray[np.float64]

LAYERS = 4 / 7
"""Of the evaluations that are left: how many go to whole layers."""

MARGINS = (1.0, 2.0)
"""How far within its bounds a layer's factor is held: at 1 barely, so that some of its groups may well take another
scheme."""

FARTHEST = 30.0
"""No factor is larger, or smaller than its inverse."""

ExpandIn = Callable[[Space, Choice], Expansion]
"""Computes an expansion at a choice of a space's units, over the calibration data."""


def layers_first(
    groups: Refinement, space: Space, tables: Mapping[str, Floats], expand: ExpandIn | None = None
) -> Iterator[list[Trial]]:
    """Refine whole layers, then allocate their groups by what was found; the trials as they come, all of them trials
    of `groups` as well.

    `space` is that of `groups`, with the metrics' `tables` (units × schemes). Where all its units are whole there is
    nothing to do.
    """
    if not space.splits_layers:
        return
    layer_of = space.layer_of
    groups.ladders = Ladders.of(groups.features.predicted, groups.sweep.costs[groups.sweep.axis].table, layer_of)
    layers = _by_layers(groups, space, tables, expand)
    known = len(layers.trials)

    def new() -> list[Trial]:
        nonlocal known
        trials = [replace(trial, choice=trial.choice[layer_of]) for trial in layers.trials[known:]]
        known, groups.spent = len(layers.trials), layers.spent
        groups.trials += trials
        return trials

    layers.begin(())
    yield new()
    for _ in layers.rounds():
        yield new()
    # The last expansions may have found nothing to measure.
    groups.spent = layers.spent
    if levels := thinned(groups.sweep.roomy, groups.left // (2 * len(MARGINS))):
        # One fit for all levels: of many groups it takes longer than measuring a small model.
        fitted = groups.surrogate()
    for level in levels:
        base = layers.best(level)
        if base is not None:
            yield groups.raced(cut(groups.features.predicted, groups.sweep, level, base.choice, layer_of), fitted)


def summed(table: Floats, layer_of: NDArray[np.int64]) -> Floats:
    """Layers × schemes: the sum over each layer's units."""
    sums = np.zeros((int(layer_of.max()) + 1, table.shape[1]))
    np.add.at(sums, layer_of, table)
    return sums


def cut(table: Floats, sweep: Sweep, level: float, base: Choice, layer_of: NDArray[np.int64]) -> list[Choice]:
    """The allocations of all groups within `level` that lose least by `table` (units × schemes), once each layer's part
    of it is multiplied so that the scheme which `base` gives it (layers) would be its best."""
    tied = _tied(sweep, layer_of)
    losses = summed(table, layer_of)
    limits = {bound.resource: np.inf for bound in sweep.bounds} | {sweep.axis: level}
    for bound in sweep.bounds:
        limits[bound.resource] = min(limits[bound.resource], bound.limit)
    prices = shadow_prices(losses, tied.costs, limits)
    with np.errstate(invalid="ignore"):  # 0 × inf: what is closed stays so
        priced = np.sum([price * tied.costs[name].table for name, price in prices.items()], axis=0)
    corrected = [table * factors(losses, priced, base, margin)[layer_of][:, None] for margin in MARGINS]
    return [choice for one in corrected for choice in sweep.frontier(one, np.array([level]))]


def factors(losses: Floats, priced: Floats, choice: Choice, margin: float) -> Floats:
    """For every unit what its losses are to be multiplied by so that its choice is that of least loss and price, both
    units × schemes: nearest to 1, and a factor of `margin` within the bounds of all that do.

    Where bounds are nearer to one another than that, or none do, what lies between them.
    """
    at = np.arange(len(choice)), choice
    with np.errstate(invalid="ignore", divide="ignore"):
        saved, dearer = losses[at][:, None] - losses, priced - priced[at][:, None]
        ratios = dearer / saved
    open_ = np.isfinite(losses) & np.isfinite(priced)
    lowest = np.where(open_ & (saved < 0), ratios, -np.inf).max(axis=1).clip(1 / FARTHEST, FARTHEST)
    highest = np.where(open_ & (saved > 0), ratios, np.inf).min(axis=1).clip(1 / FARTHEST, FARTHEST)
    low, high = lowest * margin, highest / margin
    nearest: Floats = np.where(low <= high, np.clip(1.0, low, np.maximum(low, high)), np.sqrt(lowest * highest))
    return nearest


def _by_layers(groups: Refinement, space: Space, tables: Mapping[str, Floats], expand: ExpandIn | None) -> Refinement:
    """The refinement of whole layers. It knows what was measured of them, and has its share of what is left."""
    whole, layer_of = space.whole(), space.layer_of
    known = [
        replace(trial, choice=choice)
        for trial in groups.trials
        if (choice := space.by_layers(trial.choice)) is not None
    ]

    def measure(choices: Sequence[Choice], batches: range) -> Sequence[Floats]:
        return groups.measure([choice[layer_of] for choice in choices], batches)

    return replace(
        groups,
        sweep=_tied(groups.sweep, layer_of),
        features=Features.of(whole, {metric: summed(table, layer_of) for metric, table in tables.items()}),
        measure=measure,
        evaluations=int(groups.spent + LAYERS * groups.left),
        expand=None if expand is None else lambda choice: expand(whole, choice),
        ladders=None,
        trials=known,
    )


def _tied(sweep: Sweep, layer_of: NDArray[np.int64]) -> Sweep:
    costs = {name: replace(cost, table=summed(cost.table, layer_of)) for name, cost in sweep.costs.items()}
    return replace(sweep, costs=costs)
