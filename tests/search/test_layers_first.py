"""Groups of channels, begun with whole layers: what is carried over, what it costs, and where a layer goes from there.

How much it gains is measured on real models (`python -m benchmarks.budgets smollm2-channels`)."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.budget import Bound
from search.cost import cost_tables
from search.expansion import CHARGE, Expansion
from search.layers_first import FARTHEST, LAYERS, MARGINS, cut, factors, layers_first, summed
from search.proposals import baselines
from search.refinement import Refinement
from search.space import Space
from search.surrogate import Features
from search.sweep import Choice, Sweep
from tests.search.spaces import decoder, space

MODEL = decoder(blocks=4)
SCHEMES = ("w2a16g32", "w3a16g32", "w4a16g32", "w8a16g32")
LAYERWISE = space(MODEL, "generic", schemes=SCHEMES)
GROUPS = space(MODEL, "generic", schemes=SCHEMES, granularity="channels", channels=16)
COSTS = cost_tables(GROUPS, MODEL)
OF = GROUPS.layer_of
SIZES = [4, 4, 4, 4]
BITOPS = Bound("bitops", "bitops", 0.8 * COSTS["bitops"].smallest + 0.2 * COSTS["bitops"].largest)


class TestWholeLayers:
    def test_they_are_the_space_of_a_search_by_layers(self) -> None:
        pins = {"*.v_proj": "w8a16g32"}
        cut_space = space(MODEL, "generic", schemes=SCHEMES, granularity="channels", channels=24, pin=pins)
        whole, layerwise = cut_space.whole(), space(MODEL, "generic", schemes=SCHEMES, pin=pins)
        assert len(cut_space.units) > len(layerwise.units)
        assert (whole.units, whole.schemes, whole.ignored) == (layerwise.units, layerwise.schemes, layerwise.ignored)
        np.testing.assert_array_equal(whole.allowed, layerwise.allowed)
        np.testing.assert_array_equal(whole.pinned, layerwise.pinned)

    def test_every_unit_is_a_part_of_the_layer_it_is_numbered_with(self) -> None:
        for unit, layer in zip(GROUPS.units, OF, strict=True):
            assert unit.name.startswith(LAYERWISE.units[layer].name)

    @pytest.mark.parametrize("granularity", ["layer", "block"])
    def test_a_space_of_whole_layers_is_its_own(self, granularity: str) -> None:
        one = space(MODEL, "generic", schemes=SCHEMES, granularity=granularity)
        assert one.whole().units == one.units
        assert one.layer_of.tolist() == list(range(len(one.units)))

    def test_a_choice_is_one_of_whole_layers_where_no_parts_of_one_differ(self) -> None:
        by_layers = np.arange(len(LAYERWISE.units)) % 3
        found = GROUPS.by_layers(by_layers[OF])
        assert found is not None
        assert found.tolist() == by_layers.tolist()
        parted = by_layers[OF]
        parted[-1] = 3
        assert GROUPS.by_layers(parted) is None

    def test_what_they_cost_is_what_their_groups_cost(self) -> None:
        for name, of_layers in cost_tables(LAYERWISE, MODEL).items():
            np.testing.assert_allclose(summed(COSTS[name].table, OF), of_layers.table)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses that fall with the scheme, prices that rise, units × schemes, some closed; and an open choice."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    units, schemes = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    losses = np.sort(rng.lognormal(0, 2, (units, schemes)), axis=1)[:, ::-1].copy()
    priced = np.sort(rng.lognormal(0, 1, (units, schemes)), axis=1)
    choice = rng.integers(0, schemes, units)
    closed = rng.random((units, schemes)) < 0.2
    closed[np.arange(units), choice] = False
    losses[closed] = np.inf
    return losses, priced, choice


class TestFactors:
    @given(problems())
    def test_a_choice_that_some_factor_makes_the_best_is_the_best_by_its_factor(
        self, problem: tuple[np.ndarray, np.ndarray, np.ndarray]
    ) -> None:
        losses, priced, choice = problem
        tried = np.geomspace(1 / FARTHEST, FARTHEST, 2001)
        for margin in MARGINS:
            found = factors(losses, priced, choice, margin)
            for unit, (factor, own) in enumerate(zip(found, choice, strict=True)):
                regrets = _regrets(losses[unit], priced[unit], own, tried)
                if (regrets <= 0).any():
                    assert _regrets(losses[unit], priced[unit], own, np.array([factor]))[0] <= 1e-9 * priced.max()

    @given(problems())
    def test_no_factor_nearer_to_1_would_do(self, problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        losses, priced, choice = problem
        for unit, (factor, own) in enumerate(zip(factors(losses, priced, choice, 1.0), choice, strict=True)):
            nearer = factor ** np.linspace(0, 0.999, 50)
            if 1 / FARTHEST < factor < FARTHEST and factor != 1:
                assert (_regrets(losses[unit], priced[unit], own, nearer) > 0).all()

    def test_a_margin_holds_it_well_within(self) -> None:
        losses, priced = np.array([[8.0, 4.0, 1.0]]), np.array([[0.0, 2.0, 20.0]])
        assert factors(losses, priced, np.array([0]), 1.0) == pytest.approx([0.5])
        assert factors(losses, priced, np.array([0]), 2.0) == pytest.approx([0.25])
        assert factors(losses, priced, np.array([1]), 2.0) == pytest.approx([1.0])
        # From 0.5 to 6 it is the best: between bounds nearer to each other than margins reach, in the middle.
        assert factors(losses, priced, np.array([1]), 4.0) == pytest.approx([np.sqrt(3.0)])

    def test_what_nothing_can_make_the_best_is_met_half_way(self) -> None:
        """Above the hull of the others: at 9 the cheaper one would be worse, above 0.125 the dearer one is better."""
        losses, priced = np.array([[10.0, 9.0, 1.0]]), np.array([[0.0, 9.0, 10.0]])
        assert factors(losses, priced, np.array([1]), 1.0) == pytest.approx([np.sqrt(9 / 8)])


def _regrets(losses: np.ndarray, priced: np.ndarray, own: int, tried: np.ndarray) -> np.ndarray:
    """How much more than the best the choice costs at each factor."""
    sums = np.where(np.isfinite(losses), np.where(np.isfinite(losses), losses, 0) * tried[:, None] + priced, np.inf)
    regrets: np.ndarray = sums[:, own] - sums.min(axis=1)
    return regrets


class World:
    """Layers whose sensitivities are off by a factor each, which their groups share; a layer's groups differ."""

    def __init__(self, seed: int) -> None:
        rng, units = np.random.default_rng(seed), len(GROUPS.units)
        self.proxy = rng.lognormal(-5, 0.5, (units, 1)) * 4.0 ** -np.arange(4.0)
        self.truth = self.proxy * rng.lognormal(0, 1.0, (len(LAYERWISE.units), 1))[OF]
        self.samples = rng.lognormal(0, 0.1, sum(SIZES))
        self.measured = 0.0
        self.expanded: list[tuple[int, Choice]] = []

    def loss(self, choices: Sequence[Choice]) -> np.ndarray:
        return self.truth[np.arange(len(OF)), np.array(choices)].sum(axis=1)

    def __call__(self, choices: Sequence[Choice], batches: range) -> list[np.ndarray]:
        ends = np.append(0, np.cumsum(SIZES))
        part = self.samples[ends[batches.start] : ends[batches.stop]] / self.samples.mean()
        self.measured += len(choices) * len(part) / sum(SIZES)
        return [loss * part for loss in self.loss(choices)]

    def expand(self, one: Space, choice: Choice) -> Expansion:
        """Exact, of whole layers as of groups."""
        self.expanded.append((len(one.units), choice))
        truth = summed(self.truth, OF) if len(one.units) < len(GROUPS.units) else self.truth
        changes = truth - truth[np.arange(len(choice)), choice][:, None]
        return Expansion(choice, changes[None], np.zeros_like(changes))

    def begun(self, evaluations: int, bounds: Sequence[Bound] = (Bound("avg_bits", "avg_bits", 4.5),)) -> Refinement:
        uniform = list(baselines(GROUPS).values())
        sweep = Sweep.of(COSTS, bounds, "avg_bits", 6, uniform)
        features = Features.of(GROUPS, {"proxy": self.proxy})
        loop = Refinement(sweep, features, self, SIZES, evaluations, expand=lambda one: self.expand(GROUPS, one))
        loop.whole(uniform, "uniform")
        return loop


def alike(choice: Choice) -> bool:
    """Whether every layer has one scheme."""
    return all(len(set(choice[layer == OF])) == 1 for layer in range(len(LAYERWISE.units)))


class TestCut:
    def test_what_the_predictions_find_best_anyway_is_cut_by_the_predictions(self) -> None:
        world = World(0)
        loop, table = world.begun(4), world.proxy
        level = loop.sweep.levels[2]
        tied = Sweep.of(cost_tables(LAYERWISE, MODEL), loop.sweep.bounds, "avg_bits", 8)
        base = tied.frontier(summed(table, OF), np.array([level]), prove=True)[0]
        barely = cut(table, loop.sweep, level, base, OF)[0]
        plain = loop.sweep.frontier(table, np.array([level]))[0]
        assert (barely != plain).mean() < 0.2

    @pytest.mark.parametrize("bounds", [[], [Bound("avg_bits", "avg_bits", 4.5), BITOPS]])
    def test_every_budget_and_the_level_are_kept(self, bounds: list[Bound]) -> None:
        world = World(1)
        loop = world.begun(4, bounds)
        tied = Sweep.of(cost_tables(LAYERWISE, MODEL), bounds, "avg_bits", 8)
        for level in loop.sweep.roomy[:4]:
            found = tied.frontier(summed(world.truth, OF), np.array([level]))
            for choice in cut(world.proxy, loop.sweep, level, found[0], OF):
                assert loop.sweep.admits(choice)
                assert loop.sweep.totals([choice])[0] <= level * (1 + 1e-6)

    def test_groups_within_the_layers_lose_less_than_layers_and_than_groups_by_the_predictions(self) -> None:
        """Of layers that are right and predictions that are not, over eight worlds. Layers' mean bits change little."""
        bits, losses, moved = np.array([2.0, 3.0, 4.0, 8.0]), [], []
        for seed in range(8):
            world = World(seed)
            loop = world.begun(4)
            level = float(loop.sweep.levels[1])
            tied = Sweep.of(cost_tables(LAYERWISE, MODEL), loop.sweep.bounds, "avg_bits", 8)
            base = tied.frontier(summed(world.truth, OF), np.array([level]))[0]
            predicted = loop.sweep.frontier(world.proxy, np.array([level]))[0]
            barely, well = cut(world.proxy, loop.sweep, level, base, OF)
            losses.append(np.log(world.loss([predicted, barely, base[OF], well])))
            moved += [abs(bits[well[layer == OF]].mean() - bits[base[layer]]) for layer in range(len(base))]
        by_predictions, barely_held, layers, well_held = np.mean(losses, axis=0)
        assert barely_held < by_predictions - 0.02
        assert well_held < layers - 0.01
        assert np.mean(moved) < 0.1


@pytest.mark.long
class TestLayersFirst:
    def test_layers_come_whole_then_cut_and_all_is_charged(self) -> None:
        world = World(3)
        loop = world.begun(60)
        before = len(loop.trials)
        spent_by_layers = loop.spent + LAYERS * loop.left
        for trials in layers_first(loop, GROUPS, {"proxy": world.proxy}, world.expand):
            assert trials == loop.trials[len(loop.trials) - len(trials) :]
            if not all(alike(trial.choice) for trial in trials):
                break
            assert loop.spent <= spent_by_layers
        else:
            pytest.fail("nothing was cut")
        assert len(loop.trials) > before
        for _ in layers_first(loop, GROUPS, {"proxy": world.proxy}, world.expand):
            pass
        for _ in loop.rounds():
            pass
        assert loop.spent == pytest.approx(world.measured + CHARGE * len(world.expanded))
        assert loop.spent <= 60
        assert len({trial.choice.tobytes() for trial in loop.trials}) == len(loop.trials)

    def test_nothing_is_measured_twice_from_its_beginning_on(self) -> None:
        world = World(4)
        loop = world.begun(48)
        trials = [one for found in layers_first(loop, GROUPS, {"proxy": world.proxy}) for one in found]
        uniform = len(baselines(GROUPS))
        assert len(loop.trials) == len(trials) + uniform
        whole = [one for one in loop.trials if len(one.samples) == sum(SIZES)]
        assert len({one.choice.tobytes() for one in whole}) == len(whole)

    def test_expansions_of_layers_that_find_nothing_are_charged_too(self) -> None:
        class Free(World):
            def __init__(self, seed: int) -> None:
                super().__init__(seed)
                self.proxy = self.truth = np.zeros_like(self.truth)

        world = Free(5)
        loop = world.begun(70)
        for _ in layers_first(loop, GROUPS, {"proxy": world.proxy}, world.expand):
            pass
        assert {units for units, _ in world.expanded} == {len(LAYERWISE.units)}
        assert loop.spent == pytest.approx(world.measured + CHARGE * len(world.expanded))

    @pytest.mark.parametrize("evaluations", [0, 4, 5, 6, 9])
    def test_few_evaluations_are_not_exceeded(self, evaluations: int) -> None:
        world = World(7)
        loop = world.begun(evaluations)
        for _ in layers_first(loop, GROUPS, {"proxy": world.proxy}, world.expand):
            pass
        for _ in loop.rounds():
            pass
        assert loop.spent <= max(evaluations, len(baselines(GROUPS)))

    def test_where_units_are_whole_there_is_nothing_to_do(self) -> None:
        world = World(8)
        tables = {"proxy": summed(world.proxy, OF)}
        sweep = Sweep.of(cost_tables(LAYERWISE, MODEL), [], "avg_bits", 4)
        loop = Refinement(sweep, Features.of(LAYERWISE, tables), world, SIZES, 40)
        assert list(layers_first(loop, LAYERWISE, tables)) == []
        assert world.measured == 0
