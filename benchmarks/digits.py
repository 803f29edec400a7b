"""Which search finds the frontier of an enumerated space in the fewest evaluations, the price of its proxies included.

The digits net of `benchmarks.proxies`: 6 layers × 4 schemes, whose 4 096 configurations are all measured, so that the
true frontier is known. What fills a table of sensitivities is charged as its forward passes over the same data.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.evopress import evopress
from benchmarks.proxies.measuring import Measured, measure
from benchmarks.proxies.subjects import STUDIES
from benchmarks.report import table, write
from search.budget import TOLERANCE, Bound
from search.cost import cost_tables
from search.evolution import Evolution
from search.metrics import METRICS
from search.pareto import hypervolume
from search.proposals import baselines
from search.refinement import Refinement
from search.surrogate import Features
from search.sweep import Choice, Sweep

Floats = NDArray[np.float64]

CHECKPOINTS = (24, 36, 48, 60, 72, 100, 150, 300)
SEEDS = 5
LEVELS = 20
ILPS = ("fisher", "hessian_trace", "kl", "gradient", "autoscheme", "pqi", "lrp", "higgs")
"""Metrics whose frontier is measured as it is."""
LOOPS: tuple[tuple[str, ...], ...] = (("fisher",), ("kl",), ("fisher", "kl"), ("fisher", "gradient"))
"""Metrics that the refinement starts from."""


class World:
    """The enumerated space: what every configuration costs and loses, on the data that is searched and on other."""

    def __init__(self, found: Measured) -> None:
        self.space, self.tables = found.space, {name: one.table.values.to_numpy() for name, one in found.tables.items()}
        inventory = STUDIES["digits"].build().inventory
        self.cost = cost_tables(found.space, inventory)["avg_bits"]
        self._index = {choice.tobytes(): index for index, choice in enumerate(found.choices)}
        self.choices = found.choices
        self.losses = found.losses["calibration"]
        self.costs = np.array([self.cost.total(choice) for choice in found.choices])
        self.corner = np.array([self.costs.max() * (1 + 1e-4), np.log(self.losses).max() + 1e-9])
        self.whole = self._covered(np.arange(len(self.losses)))
        self.uniform = list(baselines(found.space).values())
        self.levels = np.linspace(self.costs.min(), self.costs.max(), 50)[1:-1] * (1 + TOLERANCE)
        self._best = self._regretted(np.arange(len(self.losses)))

    def sweep(self) -> Sweep:
        """Levels from the dearest configuration down."""
        bound = Bound("avg_bits", "avg_bits", float(self.costs.max()))
        return Sweep.of({"avg_bits": self.cost}, [bound], "avg_bits", LEVELS, self.uniform)

    def at(self, choices: Sequence[Choice]) -> NDArray[np.int64]:
        """Where configurations stand."""
        return np.array([self._index[np.asarray(choice, dtype=np.int64).tobytes()] for choice in choices], dtype=int)

    def loss(self, choice: Choice) -> float:
        """Measured on the data that is searched."""
        return float(self.losses[self.at([choice])[0]])

    def share(self, choices: Sequence[Choice]) -> float:
        """Of the area that the true frontier covers in bits × log loss, how much these do."""
        return self._covered(self.at(choices)) / self.whole

    def regret(self, choices: Sequence[Choice]) -> float:
        """How much more the best of these within a budget loses than the best of all, averaged over 48 budgets."""
        return float(np.mean(self._regretted(self.at(choices)) / self._best) - 1)

    def _covered(self, indices: NDArray[np.int64]) -> float:
        points = np.column_stack([self.costs[indices], np.log(self.losses[indices])])
        return hypervolume(points[_undominated(points)], self.corner)

    def _regretted(self, indices: NDArray[np.int64]) -> Floats:
        within = self.costs[indices] <= self.levels[:, None]
        best: Floats = np.where(within, self.losses[indices], np.inf).min(axis=1)
        return best


def _undominated(points: Floats) -> NDArray[np.int64]:
    order = np.lexsort(points.T[::-1])
    falls = np.diff(np.minimum.accumulate(points[order, 1]), prepend=np.inf) < 0
    return order[falls]


Measuring = Callable[[World, int], tuple[list[Choice], float]]
"""(world, seed) → the configurations in the order in which they were measured, and what was charged before."""


def loop(metrics: tuple[str, ...], evaluations: int = CHECKPOINTS[-4]) -> Measuring:
    """Our refinement, from the corrected frontier of these metrics."""

    def run(world: World, seed: int) -> tuple[list[Choice], float]:
        passes = sum(METRICS[name].forward_passes(world.space) for name in metrics)
        features = Features.of(world.space, {name: world.tables[name] for name in metrics})

        def measured(choices: Sequence[Choice], _batches: range) -> list[Floats]:
            return [np.array([world.loss(choice)]) for choice in choices]

        search = Refinement(world.sweep(), features, measured, [1], math.floor(evaluations - passes), seed)
        search.begin(world.uniform)
        for _ in search.rounds():
            pass
        return [trial.choice for trial in search.trials], passes

    return run


def ilp(metric: str) -> Measuring:
    """Every point of the exact frontier of one metric's table, from the fewest bits up, after the uniform ones."""

    def run(world: World, _seed: int) -> tuple[list[Choice], float]:
        levels = np.linspace(world.costs.max(), world.costs.min(), 2000) * (1 + TOLERANCE)
        found = world.sweep().frontier(world.tables[metric].clip(min=0.0), levels, prove=True)
        # Those far apart first: an early end still leaves points all along.
        order = sorted(range(len(found)), key=lambda place: format(place, "012b")[::-1])
        return [*world.uniform, *(found[place] for place in order)], METRICS[metric].forward_passes(world.space)

    return run


def uniform(world: World, _seed: int) -> tuple[list[Choice], float]:
    """The uniform configurations."""
    return world.uniform, 0.0


def random(world: World, seed: int) -> tuple[list[Choice], float]:
    """The uniform ones, then any."""
    rng = np.random.default_rng(seed)
    return [*world.uniform, *rng.integers(0, 4, (CHECKPOINTS[-1], len(world.space.units)))], 0.0


def nsga(world: World, seed: int) -> tuple[list[Choice], float]:
    """NSGA-II from the uniform configurations and random ones, with no predictions."""
    rng = np.random.default_rng(seed)
    start = [*world.uniform, *rng.integers(0, 4, (12, len(world.space.units)))]
    sweep = world.sweep()
    evolution = Evolution(world.space, sweep.costs, sweep.bounds, "avg_bits", seeds=start, seed=seed)
    choices: list[Choice] = []
    while len(choices) < CHECKPOINTS[-1] and (asked := evolution.ask(4)):
        for choice in asked:
            evolution.tell(choice, world.loss(choice))
        choices += asked
    return choices, 0.0


def evolved(world: World, seed: int) -> tuple[list[Choice], float]:
    """EvoPress at eight budgets in turn, an equal share of the evaluations each, from random ones of each budget.

    All data is one batch here, so that its selection in steps has nothing to save.
    """
    rng, budgets = np.random.default_rng(seed), 8
    runs: list[list[Choice]] = []
    for limit in np.linspace(world.costs.min(), world.costs.max(), budgets + 2)[1:-1]:
        near = np.flatnonzero((world.costs <= limit * (1 + TOLERANCE)) & (world.costs >= limit * 0.97))
        start, measured = world.choices[rng.choice(near)], list[Choice]()

        def loss(choice: Choice, _fraction: float, measured: list[Choice] = measured) -> float:
            measured.append(choice.copy())
            return world.loss(choice)

        share = CHECKPOINTS[-1] / budgets
        evopress(
            loss,
            start,
            world.cost.table,
            float(limit),
            share,
            rng,
            offspring=8,
            survivors=(1,),
            fractions=(1.0,),
        )
        runs.append(measured)
    turns = [run[place] for place in range(max(map(len, runs))) for run in runs if place < len(run)]
    return [*world.uniform, *turns], 0.0


METHODS: dict[str, Measuring] = {
    **{f"refinement of {' and '.join(metrics)}": loop(metrics) for metrics in LOOPS},
    **{f"integer program on {metric}": ilp(metric) for metric in ILPS},
    "NSGA-II alone": nsga,
    "EvoPress-style": evolved,
    "random": random,
    "uniform": uniform,
}


def main() -> None:
    """Run every method and write the table."""
    argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__).parse_args()
    world = World(measure(STUDIES["digits"], math.inf))
    rows: dict[str, list[dict[str, object]]] = {"share": [], "regret": []}
    for name, method in METHODS.items():
        began = time.perf_counter()
        runs = [method(world, seed) for seed in range(1 if name.startswith(("integer", "uniform")) else SEEDS)]
        seconds = (time.perf_counter() - began) / len(runs)
        charged = runs[0][1]
        for kind, of in (("share", world.share), ("regret", world.regret)):
            row: dict[str, object] = {"": name, "charged first": charged}
            for count in CHECKPOINTS:
                values = [
                    of(choices[:enough]) for choices, before in runs if (enough := math.floor(count - before)) >= 4
                ]
                whole = all(len(choices) + before >= count for choices, before in runs)
                known = values and (whole or name.startswith(("integer", "uniform")))
                row[str(count)] = f"{np.median(values):.4f}" if known else "–"
            rows[kind].append(row | ({"seconds": seconds} if kind == "share" else {}))
        print(json.dumps(rows["share"][-1]), flush=True)
    write(
        "digits",
        "Evaluations to find the frontier of an enumerated space",
        "make bench-digits",
        [
            f"The digits net, {len(world.space.units)} layers × {len(world.space.schemes)} schemes: all "
            f"{len(world.losses)} configurations measured (KL on 360 digits). Share of the area that the true frontier "
            "covers in average bits × log loss, after so many evaluations, each a forward pass over the data; forward "
            f"passes that fill a metric's table are charged first. Medians of {SEEDS} seeds; `–`: not run so long.",
            table(rows["share"]),
            "How much more the best measured configuration within a budget loses than the best of all, averaged over "
            "48 budgets (0: the true frontier).",
            table(rows["regret"]),
            "Integer programs measure every distinct point of their metric's exact frontier, spread out first, and "
            "stop at its end. NSGA-II starts from 16 seeds (population 16); EvoPress-style is a (1+λ) search by level "
            "switches at eight budgets in turn.",
        ],
    )


if __name__ == "__main__":
    main()
