"""Refinement of groups of channels: from the predicted frontier, layers move along the ladders of their groups.

How much it gains is measured on real models (`python -m benchmarks.budgets smollm2-channels`)."""

from collections.abc import Sequence

import numpy as np
import pytest

from search.budget import Bound
from search.cost import cost_tables
from search.expansion import CHARGE, Expansion
from search.ladders import Ladders
from search.proposals import baselines
from search.refinement import Refinement
from search.surrogate import Features
from search.sweep import Choice, Sweep
from tests.search.spaces import decoder, space

pytestmark = pytest.mark.long

MODEL = decoder(blocks=4)
SCHEMES = ("w2a16g32", "w3a16g32", "w4a16g32", "w8a16g32")
GROUPS = space(MODEL, "generic", schemes=SCHEMES, granularity="channels", channels=16)
COSTS = cost_tables(GROUPS, MODEL)
UNIFORM = list(baselines(GROUPS).values())
OF = GROUPS.layer_of
SIZES = [4, 4, 4, 4]
BITOPS = Bound("bitops", "bitops", 0.8 * COSTS["bitops"].smallest + 0.2 * COSTS["bitops"].largest)
BITS = Bound("avg_bits", "avg_bits", 4.5)


class World:
    """Layers whose sensitivities are off by a factor each, which their groups share; a layer's groups differ."""

    def __init__(self, seed: int) -> None:
        rng, units = np.random.default_rng(seed), len(GROUPS.units)
        self.proxy = rng.lognormal(-5, 0.5, (units, 1)) * 4.0 ** -np.arange(4.0)
        self.truth = self.proxy * rng.lognormal(0, 1.0, (OF.max() + 1, 1))[OF]
        self.samples = rng.lognormal(0, 0.1, sum(SIZES))
        self.measured = 0.0
        self.expanded: list[Choice] = []

    def loss(self, choices: Sequence[Choice]) -> np.ndarray:
        return self.truth[np.arange(len(OF)), np.array(choices)].sum(axis=1)

    def __call__(self, choices: Sequence[Choice], batches: range) -> list[np.ndarray]:
        ends = np.append(0, np.cumsum(SIZES))
        part = self.samples[ends[batches.start] : ends[batches.stop]] / self.samples.mean()
        self.measured += len(choices) * len(part) / sum(SIZES)
        return [loss * part for loss in self.loss(choices)]

    def expand(self, choice: Choice) -> Expansion:
        """Exact."""
        self.expanded.append(choice)
        changes = self.truth - self.truth[np.arange(len(choice)), choice][:, None]
        return Expansion(choice, changes[None], np.zeros_like(changes))

    def begun(self, evaluations: int, bounds: Sequence[Bound] = (BITS,)) -> Refinement:
        """With the uniform configurations and the predicted frontier measured."""
        sweep = Sweep.of(COSTS, bounds, "avg_bits", 4, UNIFORM)
        features = Features.of(GROUPS, {"proxy": self.proxy})
        ladders = Ladders.of(self.proxy, COSTS["avg_bits"].table, OF)
        loop = Refinement(sweep, features, self, SIZES, evaluations, expand=self.expand, ladders=ladders)
        loop.whole(UNIFORM, "uniform")
        loop.whole(sweep.frontier(loop.surrogate().table)[: loop.left], "ilp")
        return loop


def test_every_expansion_brings_the_frontier_nearer_to_the_best_there_is() -> None:
    """Of four worlds, the distance in log loss that is left at the levels between the cheapest and the dearest."""
    distances = []
    for seed in range(4):
        world = World(seed)
        loop = world.begun(90)
        levels = loop.sweep.roomy
        best = np.log(world.loss(loop.sweep.frontier(world.truth, np.array(levels), prove=True)))

        def left(loop: Refinement = loop, levels: list[float] = levels, best: np.ndarray = best) -> float:
            found = [trial.loss for level in levels if (trial := loop.best(level))]
            return float(np.mean(np.log(found) - best))

        before = left()
        for _ in zip(loop.rounds(), levels, strict=False):
            pass
        once = left()
        for _ in loop.rounds():
            pass
        distances.append((before, once, left()))
    before, once, often = np.mean(distances, axis=0)
    assert once < 0.8 * before
    assert often < 0.5 * before


def test_every_level_is_expanded_before_any_is_again_and_all_before_anything_is_proposed() -> None:
    world = World(1)
    loop = world.begun(100)
    seen = [0, *(len(world.expanded) for _ in loop.rounds())]
    turns = np.diff(seen)
    assert (turns[: int(np.flatnonzero(turns).max()) + 1] >= 1).all()
    costs = loop.sweep.totals(world.expanded)
    levels = loop.sweep.roomy
    assert len(world.expanded) > len(levels)
    np.testing.assert_allclose(costs[: len(levels)], levels, rtol=0.05)


@pytest.mark.parametrize("bounds", [[BITS], [BITS, BITOPS]])
def test_every_budget_is_kept_and_what_is_expanded_is_charged(bounds: list[Bound]) -> None:
    world = World(2)
    loop = world.begun(50, bounds)
    for _ in loop.rounds():
        pass
    assert world.expanded
    assert loop.spent == pytest.approx(world.measured + CHARGE * len(world.expanded))
    assert loop.spent <= 50
    assert all(loop.sweep.admits(trial.choice) for trial in loop.trials if trial.source != "uniform")
    assert len({trial.choice.tobytes() for trial in loop.trials}) == len(loop.trials)


@pytest.mark.parametrize("evaluations", [0, 4, 5, 6, 9, 14])
def test_few_evaluations_are_not_exceeded(evaluations: int) -> None:
    loop = World(7).begun(evaluations)
    for _ in loop.rounds():
        pass
    assert loop.spent <= max(evaluations, len(UNIFORM))
