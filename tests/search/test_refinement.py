"""The loop finds what predictions miss, charges what it measures, tells how sure it was, and stops."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from search.acceptance import FOUND
from search.budget import Bound
from search.cost import cost_tables
from search.expansion import CHARGE, Expansion
from search.pareto import hypervolume
from search.proposals import baselines
from search.refinement import TOGETHER, Refinement, first
from search.surrogate import Features
from search.sweep import Choice, Sweep
from tests.search.spaces import decoder, space

pytestmark = pytest.mark.long

MODEL = decoder(blocks=1)
SPACE = space(MODEL, "generic", schemes=("w2a16g32", "w3a16g32", "w4a16g32", "w8a16g32"))
COSTS = cost_tables(SPACE, MODEL)
UNITS = len(SPACE.units)
SIZES = [4, 4, 4, 4]
UNIFORM = list(baselines(SPACE).values())


class World:
    """A proxy, and the losses of samples, which differ from it by scheme, by unit and by what layers do together."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.proxy = rng.lognormal(-5, 1, (UNITS, 1)) * 4.0 ** -np.arange(4.0) * rng.lognormal(0, 0.2, (UNITS, 4))
        self.truth = self.proxy * np.exp(rng.normal(0, 0.5, 4) + rng.normal(0, 0.8, (UNITS, 1)))
        self.samples = rng.lognormal(0, 0.7, sum(SIZES))
        self.measured = 0.0

    def loss(self, choices: Sequence[Choice]) -> np.ndarray:
        total = self.truth[np.arange(UNITS), np.array(choices)].sum(axis=1)
        return total * (1 + total)

    def __call__(self, choices: Sequence[Choice], batches: range) -> list[np.ndarray]:
        ends = np.append(0, np.cumsum(SIZES))
        part = self.samples[ends[batches.start] : ends[batches.stop]] / self.samples.mean()
        self.measured += len(choices) * len(part) / sum(SIZES)
        return [loss * part for loss in self.loss(choices)]


def refinement(world: World, evaluations: int, bits: float = 8.5, **changes: Any) -> Refinement:
    sweep = Sweep.of(COSTS, [Bound("avg_bits", "avg_bits", bits)], "avg_bits", 20, UNIFORM)
    features = Features.of(SPACE, {"proxy": world.proxy})
    return Refinement(sweep, features, world, SIZES, evaluations, **changes)


def run(loop: Refinement) -> None:
    loop.begin(UNIFORM)
    for _ in loop.rounds():
        pass


@pytest.mark.parametrize("seed", range(3))
def test_it_betters_the_best_that_the_predictions_find_within_the_same_evaluations(seed: int) -> None:
    world = World(seed)
    loop = refinement(world, 48)
    run(loop)
    plain = loop.sweep.frontier(world.proxy)[:44] + UNIFORM

    def covered(choices: Sequence[Choice]) -> float:
        points = np.column_stack([loop.sweep.totals(choices), np.log(world.loss(choices))])
        return hypervolume(points, np.array([8.6, float(np.log(world.loss([UNIFORM[0]]))[0]) + 1e-9]))

    assert covered([trial.choice for trial in loop.trials]) > 1.02 * covered(plain)


def test_it_spends_what_it_says_and_no_more() -> None:
    world = World(1)
    loop = refinement(world, 30)
    run(loop)
    assert loop.spent == pytest.approx(world.measured)
    assert 29 < loop.spent <= 30
    assert len({trial.choice.tobytes() for trial in loop.trials}) == len(loop.trials)


def test_losers_of_a_race_are_charged_in_part_and_estimated() -> None:
    world = World(3)
    world.samples = world.samples**0.2
    loop = refinement(world, 60)
    run(loop)
    raced = [trial for trial in loop.trials if len(trial.samples) < sum(SIZES)]
    assert raced
    assert len(loop.trials) > loop.spent
    # Every sample has the same share of the loss in this world: the estimate is exact.
    for trial in loop.trials:
        assert trial.loss == pytest.approx(float(world.loss([trial.choice])[0]))


def test_every_trial_keeps_the_budget_but_the_uniform_ones() -> None:
    loop = refinement(World(3), 30, bits=3.9)
    run(loop)
    assert all(loop.sweep.admits(trial.choice) for trial in loop.trials if trial.source != "uniform")


def test_uniform_configurations_that_break_a_bound_keep_nothing_from_being_found() -> None:
    """All but the cheapest break it, and lose so little that nothing within it could stand beside them."""
    world = World(2)
    world.samples = world.samples**0.2
    world.truth[0] = [world.truth[:, 0].sum(), 0, 0, 0]
    own = np.zeros_like(COSTS["avg_bits"].table)
    own[0] = COSTS["avg_bits"].table[0]
    costs = {**COSTS, "first": replace(COSTS["avg_bits"], resource="first", table=own)}
    bounds = [Bound("avg_bits", "avg_bits", 5.0), Bound("first", "first", float(own[0, 0]))]
    sweep = Sweep.of(costs, bounds, "avg_bits", 20, UNIFORM)
    loop = Refinement(sweep, Features.of(SPACE, {"proxy": world.proxy}), world, SIZES, 40)
    run(loop)
    whole = [one for one in loop.trials if one.source == "refined" and len(one.samples) == sum(SIZES)]
    assert sum(sweep.totals([one.choice for one in whole]) > sweep.totals(UNIFORM[1:2])[0]) >= 5


def test_intervals_hold_what_they_promise() -> None:
    """Nine in ten of the measurements lie within the 90 % intervals that were told before."""
    within, count = 0, 0
    for seed in range(4):
        loop = refinement(World(10 + seed), 40)
        run(loop)
        for trial in loop.trials:
            if trial.source != "uniform" and trial.expected:
                mean, deviation = trial.expected
                within += abs(np.log(trial.loss) - mean) <= 1.645 * deviation
                count += 1
    assert 0.8 <= within / count <= 0.99


def test_it_stops_when_nothing_promises_to_move_the_frontier() -> None:
    world = World(4)
    world.truth = world.proxy
    loop = refinement(world, 4000)
    run(loop)
    assert loop.spent < 400
    assert loop.gain < 1e-3


def test_a_loss_budget_draws_the_measurements_within_it() -> None:
    world = World(5)
    most = float(world.loss([UNIFORM[2]])[0])
    plain, bounded = (refinement(World(5), 48, most_loss=limit) for limit in (np.inf, most))
    for loop in (plain, bounded):
        run(loop)
    shares = [
        np.mean([trial.loss <= most * 1.05 for trial in loop.trials if trial.source == "refined"])
        for loop in (plain, bounded)
    ]
    assert shares[1] > shares[0]


def test_the_same_seed_measures_the_same_configurations() -> None:
    runs = []
    for seed in (7, 7, 8):
        loop = refinement(World(6), 24, seed=seed)
        run(loop)
        runs.append([trial.choice.tobytes() for trial in loop.trials])
    assert runs[0] == runs[1] != runs[2]


def test_nothing_is_measured_twice_though_proposed_twice() -> None:
    world = World(7)
    loop = refinement(world, 30)
    assert len(loop.whole([*UNIFORM, *UNIFORM], "uniform")) == len(UNIFORM)
    assert loop.whole(UNIFORM, "ilp") == []
    assert world.measured == len(UNIFORM)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 60, 1000])
def test_the_first_measurements_are_never_more_than_there_are(count: int) -> None:
    predicted, drawn = first(count)
    assert 0 <= drawn <= predicted
    assert predicted + drawn <= count
    assert count < TOGETHER or predicted + drawn >= TOGETHER


class Lossless(World):
    """The last scheme loses nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.proxy[:, -1] = self.truth[:, -1] = 0.0


@pytest.mark.parametrize("most", [np.inf, 1e-9])
def test_what_loses_nothing_is_measured_once_and_spoils_nothing(most: float) -> None:
    world = Lossless(9)
    loop = refinement(world, 40, most_loss=most)
    run(loop)
    assert len({trial.choice.tobytes() for trial in loop.trials}) == len(loop.trials)
    assert loop.spent == pytest.approx(world.measured)
    means, deviations = loop.surrogate().predict(np.array([trial.choice for trial in loop.trials if trial.loss > 0]))
    assert np.isfinite(means).all()
    assert np.isfinite(deviations).all()


def test_where_nothing_loses_anything_there_is_nothing_to_refine() -> None:
    world = World(9)
    world.truth = np.zeros_like(world.truth)
    loop = refinement(world, 40)
    run(loop)
    assert loop.spent <= 40
    assert all(trial.source != "refined" for trial in loop.trials)


DEEP = decoder(blocks=4)
DEEP_SPACE = space(DEEP, "generic", schemes=("w2a16g32", "w3a16g32", "w4a16g32", "w8a16g32"))
DEEP_COSTS = cost_tables(DEEP_SPACE, DEEP)


class Entangled(World):
    """Units' errors fall in with one another, which no sensitivity of one unit shows: L = |Σ e|² of random vectors."""

    def __init__(self, seed: int) -> None:
        rng, units = np.random.default_rng(seed), len(DEEP_SPACE.units)
        scales = rng.lognormal(-2.5, 0.5, (units, 1)) * 2.0 ** -np.arange(4.0)
        self.errors = rng.normal(0, 1, (units, 4, units // 2)) * scales[..., None]
        self.proxy = np.square(self.errors).sum(axis=-1)
        self.samples, self.measured = np.ones(sum(SIZES)), 0.0
        self.expanded: list[Choice] = []

    def loss(self, choices: Sequence[Choice]) -> np.ndarray:
        return np.square(self._error(np.array(choices))).sum(axis=-1)

    def expand(self, choice: Choice) -> Expansion:
        """2 eᵀδ + |δ|²: exact for one change."""
        self.expanded.append(choice)
        changes = self.errors - self.errors[np.arange(len(choice)), choice][:, None]
        return Expansion(choice, 2 * (changes @ self._error(choice))[None], np.square(changes).sum(axis=-1))

    def _error(self, choices: np.ndarray) -> np.ndarray:
        return self.errors[np.arange(len(self.errors)), choices].sum(axis=-2)

    def begun(self, evaluations: int, *, expand: bool = True) -> Refinement:
        uniform = list(baselines(DEEP_SPACE).values())
        sweep = Sweep.of(DEEP_COSTS, [Bound("avg_bits", "avg_bits", 4.5)], "avg_bits", 20, uniform)
        features = Features.of(DEEP_SPACE, {"proxy": self.proxy})
        loop = Refinement(sweep, features, self, SIZES, evaluations, expand=self.expand if expand else None)
        loop.begin(uniform)
        return loop

    def refined(self, evaluations: int, *, expand: bool = True) -> Refinement:
        loop = self.begun(evaluations, expand=expand)
        for _ in loop.rounds():
            pass
        return loop


def test_expansions_find_what_interactions_hide() -> None:
    """The best within every level loses a tenth less, on average, within the same evaluations."""
    means = []
    for expand in (True, False):
        for seed in range(2):
            loop = Entangled(seed).refined(48, expand=expand)
            totals = loop.sweep.totals([trial.choice for trial in loop.trials])
            logs = np.log([trial.loss for trial in loop.trials])
            means.append(np.mean([logs[totals <= level * (1 + 1e-6)].min() for level in loop.sweep.roomy]))
    assert np.mean(means[:2]) < np.mean(means[2:]) - 0.1


def test_an_expansion_is_charged_and_none_is_made_twice() -> None:
    world = Entangled(1)
    loop = world.refined(60)
    assert len(world.expanded) == len({choice.tobytes() for choice in world.expanded}) > 1
    assert loop.spent == pytest.approx(world.measured + CHARGE * len(world.expanded))
    assert loop.spent <= 60


def test_trials_count_the_expansions_that_led_to_them_or_to_what_they_were_to_better() -> None:
    world = Entangled(1)
    loop = world.begun(44)
    assert {trial.tier for trial in loop.trials} == {0, 1}
    proposed = expanded = 0
    known = list(loop.trials)
    for new in loop.rounds():
        of = {trial.choice.tobytes(): trial.expansions for trial in known}
        if len(world.expanded) > expanded:
            counts = {of[choice.tobytes()] + 1 for choice in world.expanded[expanded:]}
        else:
            counts = set(of.values())
            proposed += sum(trial.expansions > 0 for trial in new)
        assert {trial.expansions for trial in new} <= counts
        assert all(trial.tier == FOUND + trial.expansions for trial in new)
        known, expanded = known + new, len(world.expanded)
    assert expanded
    assert proposed


def test_few_evaluations_are_all_measurements() -> None:
    world = Entangled(1)
    loop = world.refined(12)
    assert not world.expanded
    assert loop.spent == pytest.approx(world.measured)
