"""Layers between two schemes: what the rungs are, and how far a step may go."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.budget import Bound
from search.cost import Cost
from search.expansion import Expansion
from search.ladders import MOST_RUNGS, REACHES, Ladders
from search.sweep import Sweep

LAYER_OF = np.array([0, 0, 0, 1, 1, 1, 1, 2])
BITS = np.tile([2.0, 3.0, 4.0, 8.0], (len(LAYER_OF), 1))


def predictions(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.lognormal(0, 1, (len(LAYER_OF), 1)) * 4.0 ** -np.arange(4.0) * rng.lognormal(0, 0.3, (len(LAYER_OF), 4))


def near(seed: int, choice: np.ndarray, folds: int = 1) -> Expansion:
    changes = np.random.default_rng(seed).normal(0, 1, (folds, len(LAYER_OF), 4))
    changes[:, np.arange(len(LAYER_OF)), choice] = 0.0
    return Expansion(choice, changes, np.zeros(changes.shape[1:]))


def sweep(level: float) -> Sweep:
    return Sweep({"bits": Cost("bits", BITS, 0.0)}, [Bound("avg_bits", "bits", level)], "bits", np.array([level]))


@given(st.integers(0, 10**6))
def test_no_mixture_that_costs_as_little_is_predicted_to_lose_less_than_a_rung(seed: int) -> None:
    table = predictions(seed)
    ladders = Ladders.of(table, BITS, LAYER_OF)
    for of, rungs in zip(ladders.units, ladders.rungs, strict=True):
        every = np.array(list(product(range(4), repeat=len(of))))
        costs, losses = BITS[of, every].sum(axis=1), table[of, every].sum(axis=1)
        for rung in rungs:
            assert table[of, rung].sum() <= losses[costs <= BITS[of, rung].sum()].min() * (1 + 1e-9)
        climbed = BITS[of, rungs].sum(axis=1)
        assert (np.diff(climbed) > 0).all()
        assert (climbed[0], climbed[-1]) == (2 * len(of), 8 * len(of))


def test_of_many_groups_some_rungs_are_kept_from_the_cheapest_to_the_dearest() -> None:
    groups = 200
    table = np.random.default_rng(0).lognormal(0, 1, (groups, 1)) * 4.0 ** -np.arange(4.0)
    (rungs,) = Ladders.of(table, np.tile(BITS[0], (groups, 1)), np.zeros(groups, dtype=np.int64)).rungs
    assert len(rungs) == MOST_RUNGS
    assert (rungs[0] == 0).all()
    assert (rungs[-1] == 3).all()
    steps = np.diff(BITS[0, rungs].sum(axis=1))
    assert steps.max() < 6 * groups / 40


def test_a_closed_choice_is_on_no_rung() -> None:
    table, costs = predictions(0), BITS.copy()
    costs[:4, 2] = np.inf
    ladders = Ladders.of(table, costs, LAYER_OF)
    chosen = np.concatenate([rungs[:, place] for rungs in ladders.rungs[:1] for place in range(3)])
    assert 2 not in chosen
    assert 2 in ladders.rungs[1]


@given(st.integers(0, 10**6))
def test_neighbours_keep_the_level_promise_something_and_go_no_farther_than_they_may(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ladders = Ladders.of(predictions(seed), BITS, LAYER_OF)
    choice = rng.integers(0, 4, len(LAYER_OF))
    level = float(BITS[0, choice].sum())
    expansion = near(seed, choice)
    found = ladders.neighbours(expansion, sweep(level), level)
    assert len({one.tobytes() for one, _ in found}) == len(found) <= len(REACHES)
    for one, adds in found:
        assert BITS[0, one].sum() <= level * (1 + 1e-6)
        assert adds == pytest.approx(expansion.changes[np.arange(len(one)), one].sum())
        assert adds < 0
        for of, rungs in zip(ladders.units, ladders.rungs, strict=True):
            assert (one[of] == choice[of]).all() or (one[of] == rungs).all(axis=1).any()
            away = BITS[0, rungs].sum(axis=1) - BITS[0, choice[of]].sum()
            went = BITS[0, one[of]].sum() - BITS[0, choice[of]].sum()
            next_up, next_down = min(away[away > 0], default=0), max(away[away < 0], default=0)
            reach = max(REACHES) * 6 * len(of)
            assert min(-reach, next_down) - 1e-9 <= went <= max(reach, next_up) + 1e-9


def test_none_within_reach_adds_less_where_there_is_room() -> None:
    ladders = Ladders.of(predictions(1), BITS, LAYER_OF)
    choice = np.concatenate([rungs[len(rungs) // 2] for rungs in ladders.rungs])
    expansion, room = near(1, choice), 8.0 * len(LAYER_OF)
    (least,) = [adds for _, adds in ladders.neighbours(expansion, sweep(room), room)][-1:]
    best = 0.0
    for of, rungs in zip(ladders.units, ladders.rungs, strict=True):
        sums = expansion.changes[of, rungs].sum(axis=1)
        away = BITS[0, rungs].sum(axis=1) - BITS[0, choice[of]].sum()
        reach = max(REACHES) * 6 * len(of)
        near_by = (
            (abs(away) <= reach) | (away == min(away[away > 0], default=0)) | (away == max(away[away < 0], default=0))
        )
        best += min(0.0, sums[near_by].min())
    assert least == pytest.approx(best)


@pytest.mark.parametrize("unit", [1.0, 10.0])
def test_the_next_rung_is_not_one_of_the_same_cost(unit: float) -> None:
    """Whose costs may differ by what they are rounded by: in mean bits, and not in bytes."""
    bits, choice = np.array([2.25, 4.25, 8.25]), np.array([1, 1, 2])
    costs = np.tile(bits, (3, 1)) / unit
    table = np.array([[2.19], [0.88], [0.52]]) * 4.0 ** -np.array([0.0, 2.0, 6.0])
    ladders = Ladders.of(table, costs, np.zeros(3, dtype=np.int64))
    dearest = float(costs[:, 2].sum())
    dearer = Expansion(choice, -(bits - bits[choice][:, None])[None], np.zeros((3, 3)))
    asked = Sweep({"cost": Cost("cost", costs, 0.0)}, [], "cost", np.array([dearest]))
    assert [one.tolist() for one, _ in ladders.neighbours(dearer, asked, dearest)] == [[2, 2, 1]]


def test_noise_of_single_groups_is_judged_by_their_layer() -> None:
    """Folds that contradict each other about two groups of twelve, and agree about their sum."""
    layer_of, costs, choice = np.zeros(12, dtype=np.int64), np.tile([2.0, 4.0], (12, 1)), np.zeros(12, dtype=np.int64)
    ladders = Ladders.of(np.column_stack([np.linspace(3, 2, 12), np.ones(12)]), costs, layer_of)
    torn = np.array([5.0, -5.0, 5.0, -5.0])
    first = np.zeros((4, 12, 2))
    first[:, 0, 1], first[:, 1, 1] = torn - 1, -torn - 1
    expansion = Expansion(choice, first, np.zeros((12, 2)))
    asked = Sweep({"bits": Cost("bits", costs, 0.0)}, [], "bits", np.array([48.0]))
    best, adds = min(ladders.neighbours(expansion, asked, 48.0), key=lambda one: one[1])
    assert abs(expansion.changes[0, 1]) < 0.5
    assert best.tolist() == [1, 1] + [0] * 10
    assert adds == pytest.approx(-2.0)


def test_where_every_step_costs_there_is_no_neighbour() -> None:
    choice = np.zeros(len(LAYER_OF), dtype=np.int64)
    expansion = near(2, choice)
    costly = Expansion(choice, abs(expansion.first), expansion.second)
    assert Ladders.of(predictions(2), BITS, LAYER_OF).neighbours(costly, sweep(99.0), 99.0) == []
