"""Evolution on enumerated problems: every budget is kept, nothing is asked twice, and the exact frontier comes near."""

import itertools
import logging

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import knapsack
from search.budget import Bound
from search.cost import Cost, Resource, cost_tables
from search.evolution import Evolution
from search.inventory import Layer
from search.pareto import hypervolume
from search.scheme import Scheme
from search.space import Space, Unit
from search.variation import Choice, Variation
from tests.search.spaces import decoder, space

SCHEMES = ("w2a16g32", "w3a16g32", "w4a16g32", "w8a16g32")
MODEL = decoder(blocks=3)
SPACE = space(MODEL, "generic", schemes=SCHEMES, ignore=["*embed*", "*.[kvo]_proj", "*.gate_proj", "*.up_proj"])
COSTS = cost_tables(SPACE, MODEL)
BITS = COSTS["avg_bits"]
ROWS = np.arange(6)
ALL = np.array(list(itertools.product(range(4), repeat=6)))
"""6 units, two in each of three blocks, × 4 schemes: 4096 configurations."""


class World:
    """A loss that nearly adds up: units that are damaged together lose more, or less."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.predicted = rng.lognormal(-3, 1, (6, 1)) * 4.0 ** -np.array([0, 1, 2, 6]) * rng.lognormal(0, 0.3, (6, 4))
        self.alone = self.predicted * rng.lognormal(0, 0.7, (6, 1))
        self.together = np.triu(rng.normal(0, 0.8, (6, 6)), 1)

    def loss(self, choices: np.ndarray) -> np.ndarray:
        damage = np.sqrt(self.alone[ROWS, choices])
        added = (damage**2).sum(axis=-1)
        return np.maximum(added + np.einsum("...i,ij,...j", damage, self.together, damage), 0.2 * added)

    def points(self, choices: np.ndarray) -> np.ndarray:
        return np.column_stack([BITS.table[ROWS, choices].sum(axis=1), np.log(self.loss(choices))])

    def seeds(self, limit: float = BITS.largest) -> list[Choice]:
        """The uniforms, and eight points of the predicted frontier."""
        levels = np.linspace(BITS.smallest, limit, 8) * (1 + 1e-9)
        solved = [one.choice for one in knapsack.frontier(self.predicted, BITS.table, levels)]
        return [*(np.full(6, scheme) for scheme in range(4)), *(choice for choice in solved if choice is not None)]


def evolved(evolution: Evolution, world: World, evaluations: int, batch: int = 4) -> np.ndarray:
    choices: list[Choice] = []
    while len(choices) < evaluations and (asked := evolution.ask(batch)):
        for choice in asked:
            evolution.tell(choice, float(world.loss(choice)))
        choices += asked
    return np.array(choices)


@pytest.mark.parametrize("limit", [BITS.largest, 4.0], ids=["no budget", "4 bits"])
def test_from_the_predicted_frontier_the_exact_one_comes_near(limit: float) -> None:
    gains, reached = [], []
    for seed in range(4):
        world = World(seed)
        points = world.points(ALL)
        corner = np.array([limit + 1e-6, points[:, 1].max() + 1e-6])
        points = points[np.lexsort(points.T[::-1])]
        exact = hypervolume(points[np.diff(np.minimum.accumulate(points[:, 1]), prepend=np.inf) < 0], corner)
        seeds = world.seeds(limit)
        bounds = [Bound("avg_bits", "avg_bits", limit)]
        found = evolved(Evolution(SPACE, COSTS, bounds, "avg_bits", seeds=seeds, seed=seed), world, 300)
        at_first = hypervolume(world.points(np.array(seeds)), corner)
        gains.append((hypervolume(world.points(found), corner) - at_first) / (exact - at_first))
        reached.append(hypervolume(world.points(found), corner) / exact)
    assert np.mean(gains) > 0.7
    assert np.mean(reached) > 0.97


def test_parents_matter() -> None:
    """Losses told at random find less than the losses themselves."""
    world, rng = World(0), np.random.default_rng(0)
    corner = world.points(ALL).max(axis=0) + 1e-6
    blind = Evolution(SPACE, COSTS, [], "avg_bits", seeds=world.seeds(), seed=0)
    choices: list[Choice] = []
    while len(choices) < 150:
        for choice in blind.ask(4):
            blind.tell(choice, float(rng.random()))
            choices.append(choice)
    seeing = evolved(Evolution(SPACE, COSTS, [], "avg_bits", seeds=world.seeds(), seed=0), world, 150)
    assert hypervolume(world.points(seeing), corner) > hypervolume(world.points(np.array(choices)), corner)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Space, dict[Resource, Cost], list[Bound], list[Choice]]:
    """Up to 8 units × 4 schemes, some closed, some units pinned, in blocks or not; up to two budgets; up to three
    choices as seeds, the first of which defines the budgets, so that it keeps them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    units, schemes = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    names = [f"layers.{index}" for index in range(units)]
    blocks = [f"block.{index // 2}" if draw(st.booleans()) else None for index in range(units)]
    layers = [Layer(name, "linear", 32, 32, 1024, block) for name, block in zip(names, blocks, strict=True)]
    allowed = rng.random((units, schemes)) < 0.8
    allowed[ROWS[:1].repeat(units) + np.arange(units), rng.integers(0, schemes, units)] = True
    pinned = rng.random(units) < 0.2
    allowed[pinned] = np.arange(schemes) == allowed[pinned].argmax(axis=1)[:, None]
    drawn = Space(
        tuple(Unit(layer.name, (layer,)) for layer in layers),
        tuple(Scheme.parse(text) for text in SCHEMES[:schemes]),
        allowed,
        pinned,
        (),
    )
    costs: dict[Resource, Cost] = {
        "avg_bits": Cost("avg_bits", np.where(allowed, rng.lognormal(0, 1, (units, schemes)), np.inf), 0.0),
        "bitops": Cost("bitops", np.where(allowed, rng.integers(1, 4, (units, schemes)).astype(float), np.inf), 7.0),
    }
    seeds = [np.array([rng.choice(np.flatnonzero(row)) for row in allowed]) for _ in range(draw(st.integers(1, 3)))]
    resources: list[Resource] = draw(st.lists(st.sampled_from(["avg_bits", "bitops"]), max_size=2, unique=True))
    return drawn, costs, [Bound(name, name, costs[name].total(seeds[0])) for name in resources], seeds


def feasible(space: Space, costs: dict[Resource, Cost], bounds: list[Bound]) -> set[tuple[int, ...]]:
    """The oracle: all open choices that keep all bounds."""
    rows = [np.flatnonzero(row).tolist() for row in space.allowed]
    return {
        choice
        for choice in itertools.islice(itertools.product(*rows), 70_000)
        if all(bound.admits(costs[bound.resource].total(np.array(choice))) for bound in bounds)
    }


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 9))
def test_every_choice_asked_is_open_keeps_every_bound_and_is_asked_once(
    problem: tuple[Space, dict[Resource, Cost], list[Bound], list[Choice]], seed: int
) -> None:
    drawn, costs, bounds, seeds = problem
    evolution = Evolution(drawn, costs, bounds, "avg_bits", seeds=seeds, seed=seed, population=4)
    rng, seen = np.random.default_rng(seed), set()
    while len(seen) < 40 and (asked := evolution.ask(5)):
        for choice in asked:
            assert choice.dtype == np.int64
            assert drawn.allowed[np.arange(len(choice)), choice].all()
            assert all(bound.admits(costs[bound.resource].total(choice)) for bound in bounds)
            assert tuple(choice) not in seen
            seen.add(tuple(choice))
            evolution.tell(choice, float(rng.choice([1.0, 2.0, np.nan])))
    assert tuple(seeds[0]) in seen
    if len(bounds) < 2 and len(seen) < 40:
        # Under one budget, single switches join all choices through the cheapest.
        assert seen == feasible(drawn, costs, bounds)


class TestVariation:
    @settings(max_examples=200, deadline=None)
    @given(problems(), st.integers(0, 99))
    def test_switches_are_of_one_level_and_two_go_opposite_ways(
        self, problem: tuple[Space, dict[Resource, Cost], list[Bound], list[Choice]], seed: int
    ) -> None:
        drawn, costs, bounds, (start, *_) = problem
        variation, generator = Variation(drawn, costs, bounds, "avg_bits"), np.random.default_rng(seed)
        levels = [np.flatnonzero(row)[costs["avg_bits"].table[u, row].argsort()] for u, row in enumerate(drawn.allowed)]
        choice = start
        for _ in range(10):
            changed = variation.switched(choice, generator)
            steps = [
                order.tolist().index(new) - order.tolist().index(old)
                for order, new, old in zip(levels, changed, choice, strict=True)
            ]
            assert sorted(step for step in steps if step) in ([], [-1], [1], [-1, 1])
            assert variation.admits(changed)
            choice = changed

    @settings(max_examples=50, deadline=None)
    @given(problems())
    def test_neighbours_are_all_choices_within_the_bounds_one_and_two_switches_away(
        self, problem: tuple[Space, dict[Resource, Cost], list[Bound], list[Choice]]
    ) -> None:
        drawn, costs, bounds, (start, *_) = problem
        variation, every = Variation(drawn, costs, bounds, "avg_bits"), feasible(drawn, costs, bounds)
        for switches, neighbours in ((1, variation.one_switch), (2, variation.two_switches)):
            near = {choice for choice in every if (np.array(choice) != start).sum() == switches}
            found = [tuple(choice.tolist()) for choice in neighbours(start)]
            assert len(found) == len(near)
            assert set(found) == near

    def test_at_the_budget_a_unit_goes_up_only_where_another_comes_down(self) -> None:
        uniform = np.full(6, 1)
        variation = Variation(SPACE, COSTS, [Bound("avg_bits", "avg_bits", BITS.total(uniform))], "avg_bits")
        generator = np.random.default_rng(0)
        changes = [variation.switched(uniform, generator) - uniform for _ in range(200)]
        assert {tuple(sorted(change[change != 0])) for change in changes} == {(-1,), (-1, 1)}

    def test_whole_blocks_come_from_either_parent(self) -> None:
        variation, generator = Variation(SPACE, COSTS, [], "avg_bits"), np.random.default_rng(0)
        children = {tuple(variation.crossed(np.zeros(6, int), np.ones(6, int), generator)) for _ in range(200)}
        assert children == {tuple(np.repeat(blocks, 2)) for blocks in itertools.product(range(2), repeat=3)}

    def test_blocks_that_exceed_a_budget_come_from_the_first_parent(self) -> None:
        one, other = np.array([0, 0, 0, 0, 3, 3]), np.array([3, 3, 0, 0, 0, 0])
        bound = Bound("avg_bits", "avg_bits", BITS.total(one))
        variation, generator = Variation(SPACE, COSTS, [bound], "avg_bits"), np.random.default_rng(0)
        children = [variation.crossed(one, other, generator) for _ in range(100)]
        assert all(bound.admits(BITS.total(child)) for child in children)
        assert {tuple(child[::2]) for child in children} == {(0, 0, 3), (0, 0, 0), (3, 0, 0)}

    def test_a_unit_without_a_block_is_one_of_its_own(self) -> None:
        layers = [Layer(name, "linear", 32, 32, 1024, None) for name in ("a", "b")]
        alone = Space(
            tuple(Unit(layer.name, (layer,)) for layer in layers),
            tuple(map(Scheme.parse, SCHEMES[:2])),
            np.ones((2, 2), bool),
            np.zeros(2, bool),
            (),
        )
        variation = Variation(alone, {"avg_bits": Cost("avg_bits", np.ones((2, 2)), 0.0)}, [], "avg_bits")
        generator = np.random.default_rng(0)
        children = {tuple(variation.crossed(np.zeros(2, int), np.ones(2, int), generator)) for _ in range(100)}
        assert children == {(0, 0), (0, 1), (1, 0), (1, 1)}


class TestAskAndTell:
    def test_seeds_come_first_each_once_and_those_beyond_a_budget_not_at_all(self) -> None:
        cheap, dear = np.full(6, 0), np.full(6, 3)
        bound = Bound("avg_bits", "avg_bits", 4.0)
        evolution = Evolution(SPACE, COSTS, [bound], "avg_bits", seeds=[dear, cheap, cheap, np.full(6, 1)], seed=0)
        assert [choice.tolist() for choice in evolution.ask(2)] == [[0] * 6, [1] * 6]

    def test_batches_asked_before_anything_is_told_differ(self) -> None:
        evolution = Evolution(SPACE, COSTS, [], "avg_bits", seeds=[np.full(6, 1)], seed=0)
        asked = [tuple(choice) for _ in range(4) for choice in evolution.ask(10)]
        assert len(set(asked)) == 40

    def test_the_best_seeds_are_the_parents_of_what_follows(self) -> None:
        """Optuna by itself puts no trial that it did not sample into a generation: bad seeds would breed for ever."""
        good = [np.array([0, 0, 0, 0, 0, 0]), np.array([1, 0, 0, 0, 0, 0])]
        bad = [np.array([3, 3, 3, 3, 3, 3]), np.array([3, 3, 3, 3, 3, 2])]
        evolution = Evolution(SPACE, COSTS, [], "avg_bits", seeds=[*good, *bad], seed=0, population=2)
        for loss, choice in zip([2.0, 1.0, 9.0, 9.0], evolution.ask(4), strict=True):
            evolution.tell(choice, loss)
        assert max(choice.sum() for choice in evolution.ask(20)) < 9

    def test_of_two_parents_the_better_has_more_children(self) -> None:
        children: list[Choice] = []
        for seed in range(20):
            seeds = [np.full(6, 0), np.full(6, 3)]
            evolution = Evolution(SPACE, COSTS, [], "avg_bits", seeds=seeds, seed=seed, population=2)
            for loss, choice in zip([1.0, 9.0], evolution.ask(2), strict=True):
                evolution.tell(choice, loss)
            children += evolution.ask(5)
        assert np.mean([child.sum() < 9 for child in children]) > 0.65

    def test_the_same_seed_and_the_same_tells_give_the_same_choices(self) -> None:
        world = World(0)
        runs = [
            evolved(Evolution(SPACE, COSTS, [], "avg_bits", seeds=world.seeds(), seed=seed), world, 60).tolist()
            for seed in (3, 3, 4)
        ]
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]

    @pytest.mark.parametrize("failed", [float("nan"), float("inf")])
    def test_a_failed_measurement_breeds_nothing_and_the_search_goes_on(self, failed: float) -> None:
        storage = optuna.storages.InMemoryStorage()
        evolution = Evolution(
            SPACE, COSTS, [], "avg_bits", seeds=[np.full(6, 1)], seed=0, storage=storage, population=4
        )
        asked = evolution.ask(12)
        for choice in asked:
            evolution.tell(choice, failed)
        later = evolution.ask(12)
        assert len({tuple(choice) for choice in asked + later}) == 24
        study = optuna.load_study(study_name="evolution", storage=storage)
        assert [trial.state.name for trial in study.trials] == ["FAIL"] * 12 + ["RUNNING"] * 12

    def test_the_first_word_on_a_choice_counts(self) -> None:
        storage = optuna.storages.InMemoryStorage()
        evolution = Evolution(SPACE, COSTS, [], "avg_bits", seeds=[np.full(6, 1)], seed=0, storage=storage)
        (choice,) = evolution.ask(1)
        evolution.tell(choice, 0.5)
        evolution.tell(choice, 0.7)
        (trial,) = optuna.load_study(study_name="evolution", storage=storage).trials
        assert trial.values == [0.5, BITS.total(choice)]
        assert set(trial.params.values()) == {"w3a16g32"}

    def test_what_was_told_is_known_in_the_order_in_which_it_was_asked(self) -> None:
        storage = optuna.storages.InMemoryStorage()
        asked = Evolution(SPACE, COSTS, [], "avg_bits", seeds=[np.full(6, 1)], seed=0, storage=storage).ask(6)
        evolution = Evolution(SPACE, COSTS, [], "avg_bits", seeds=[np.full(6, 1)], seed=0, storage=storage)
        for place in (4, 0, 2):
            evolution.tell(asked[place], 0.5)
        assert [choice.tolist() for choice in evolution.told] == [asked[place].tolist() for place in (0, 2, 4)]

    def test_a_choice_that_was_never_asked_is_refused(self) -> None:
        evolution = Evolution(SPACE, COSTS, [], "avg_bits", seeds=[np.full(6, 1)], seed=0)
        with pytest.raises(ValueError, match="never asked"):
            evolution.tell(np.full(6, 2), 0.1)

    def test_optuna_is_silent(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            evolved(Evolution(SPACE, COSTS, [], "avg_bits", seeds=[np.full(6, 1)], seed=0), World(0), 20)
        assert capfd.readouterr() == ("", "")
        assert not caplog.records


class TestNothingLeft:
    def test_when_all_units_are_pinned_their_choice_is_asked_and_no_more(self) -> None:
        pinned = space(MODEL, "generic", schemes=SCHEMES, pin={"*": "w4a16g32"})
        costs = cost_tables(pinned, MODEL)
        seeds = [pinned.allowed.argmax(axis=1)] * 2
        evolution = Evolution(pinned, costs, [], "avg_bits", seeds=seeds, seed=0)
        assert [len(evolution.ask(4)) for _ in range(3)] == [1, 0, 0]

    def test_one_scheme_leaves_one_choice(self) -> None:
        one = space(MODEL, "generic", schemes=SCHEMES[:1])
        seeds = [np.zeros(len(one.units), int)]
        evolution = Evolution(one, cost_tables(one, MODEL), [], "avg_bits", seeds=seeds, seed=0)
        (choice,) = evolution.ask(4)
        evolution.tell(choice, 0.5)
        assert evolution.ask(4) == []

    def test_a_budget_that_only_the_cheapest_choice_keeps_leaves_one(self) -> None:
        bound = Bound("avg_bits", "avg_bits", BITS.smallest)
        evolution = Evolution(SPACE, COSTS, [bound], "avg_bits", seeds=World(0).seeds(), seed=0)
        assert [choice.tolist() for choice in evolution.ask(9)] == [[0] * 6]

    def test_without_a_seed_that_fits_nothing_is_asked(self) -> None:
        bound = Bound("avg_bits", "avg_bits", 2.6)
        assert Evolution(SPACE, COSTS, [bound], "avg_bits", seeds=[np.full(6, 2)], seed=0).ask(3) == []

    def test_where_no_single_switch_fits_pairs_find_the_last_choice(self) -> None:
        """The second budget is for what the first leaves: only what costs as much as the seed keeps both."""
        seed = np.array([1, 0, 0, 0, 0, 0])
        costs: dict[Resource, Cost] = {"avg_bits": BITS, "bitops": Cost("bitops", -BITS.table, 100.0)}
        bounds = [Bound(name, name, costs[name].total(seed)) for name in costs]
        evolution = Evolution(SPACE, costs, bounds, "avg_bits", seeds=[seed], seed=0)
        asked = {tuple(choice.tolist()) for choice in evolution.ask(9)}
        assert asked == {(1, 0, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0), (0, 0, 0, 0, 1, 0)} == feasible(SPACE, costs, bounds)
