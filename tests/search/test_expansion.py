"""What an expansion believes, and whom it proposes: few changes, within the level, best among as few."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.budget import Bound
from search.cost import cost_tables
from search.expansion import SHARES, Expansion
from search.sweep import Choice, Sweep
from tests.search.spaces import decoder, space

MODEL = decoder(blocks=1)
SPACE = space(MODEL, "generic", schemes=("w2a16g32", "w3a16g32", "w4a16g32"))
COSTS = cost_tables(SPACE, MODEL)
UNITS = len(SPACE.units)
EVERY = [np.array(one) for one in product(range(3), repeat=UNITS)] if UNITS <= 8 else []


def sweep(bits: float) -> Sweep:
    return Sweep(COSTS, [Bound("avg_bits", "avg_bits", bits)], "avg_bits", np.array([bits]))


def an_expansion(seed: int) -> Expansion:
    rng = np.random.default_rng(seed)
    choice = rng.integers(0, 3, UNITS)
    changes = rng.normal(0, 1, (UNITS, 3))
    changes[np.arange(UNITS), choice] = 0.0
    return Expansion(choice, changes[None], np.zeros_like(changes))


def count(expansion: Expansion, choice: Choice) -> int:
    return int((choice != expansion.choice).sum())


@given(seed=st.integers(0, 10**6))
def test_neighbours_are_few_changes_away_within_the_level_and_better(seed: int) -> None:
    expansion = an_expansion(seed)
    level = float(COSTS["avg_bits"].total(expansion.choice))
    found = expansion.neighbours(sweep(level), level)
    assert len({one.tobytes() for one, _ in found}) == len(found) <= len(SHARES)
    for one, adds in found:
        assert count(expansion, one) <= max(1, round(max(SHARES) * UNITS))
        assert COSTS["avg_bits"].total(one) <= level * (1 + 1e-6)
        assert expansion.change(one) == adds < 0


@given(seed=st.integers(0, 10**6))
def test_none_with_as_few_changes_adds_less_where_there_is_room_for_all(seed: int) -> None:
    expansion = an_expansion(seed)
    least = np.sort(expansion.changes.min(axis=1))
    for one, _ in expansion.neighbours(sweep(8.0), 8.0):
        assert expansion.change(one) == pytest.approx(least[: count(expansion, one)].sum())


@pytest.mark.parametrize("seed", range(6))
def test_none_with_as_few_changes_is_much_better_at_a_tight_level(seed: int) -> None:
    assert EVERY
    expansion = an_expansion(seed)
    level = float(COSTS["avg_bits"].total(expansion.choice))
    totals = np.array([COSTS["avg_bits"].total(one) for one in EVERY])
    changes = np.array([expansion.change(one) for one in EVERY])
    counts = np.array([count(expansion, one) for one in EVERY])
    for one, _ in expansion.neighbours(sweep(level), level):
        best = changes[(totals <= level * (1 + 1e-6)) & (counts <= count(expansion, one))].min()
        assert expansion.change(one) <= 0.5 * best


def test_a_closed_choice_is_never_taken() -> None:
    expansion = an_expansion(3)
    expansion.first[:, 0] = np.where(np.arange(3) == expansion.choice[0], 0.0, np.inf)
    assert all(one[0] == expansion.choice[0] for one, _ in expansion.neighbours(sweep(8.0), 8.0))


def test_where_every_change_costs_there_is_no_neighbour() -> None:
    expansion = an_expansion(4)
    costly = Expansion(expansion.choice, np.abs(expansion.first), expansion.second)
    assert costly.neighbours(sweep(8.0), 8.0) == []


def test_what_the_folds_contradict_is_not_believed() -> None:
    choice = np.array([0, 0])
    agreed, torn = [-1.0, -1.1, -0.9, -1.0], [-4.0, 3.0, -3.0, 2.0]
    first = np.array([[[0.0, a], [0.0, t]] for a, t in zip(agreed, torn, strict=True)])
    expansion = Expansion(choice, first, np.zeros((2, 2)))
    assert expansion.changes[0, 1] == pytest.approx(-1.0, rel=0.01)
    assert abs(expansion.changes[1, 1]) < 0.1 * 0.5
    assert (expansion.changes[:, 0] == 0).all()


def test_terms_of_second_order_are_added_and_closed_choices_stay_closed() -> None:
    first = np.array([[[0.0, -1.0, np.inf]]] * 2)
    expansion = Expansion(np.array([0]), first, np.array([[0.0, 0.25, np.inf]]))
    assert expansion.changes.tolist() == [[0.0, -0.75, np.inf]]
