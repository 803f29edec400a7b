"""Switches keep the capacities and never lose more."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from search.switches import filled, paired, repaired


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(0.0, 1.0))
def test_an_allocation_is_repaired_then_improved_within_all_capacities(seed: int, budgets: int, reach: float) -> None:
    rng = np.random.default_rng(seed)
    loss, costs = rng.lognormal(0, 2, (8, 4)), rng.integers(-3, 9, (budgets, 8, 4)).astype(float)
    rows, start = np.arange(8), rng.integers(0, 4, 8)
    least, most = costs.min(axis=2).sum(axis=1), costs.max(axis=2).sum(axis=1)
    capacities = least + reach * (most - least)
    reduced = loss - loss.min(axis=1, keepdims=True)
    fits = repaired(start, reduced, costs, capacities)
    if fits is None:
        return
    stages = [fits, filled(fits, loss, costs, capacities), paired(fits, reduced, loss, costs, capacities)]
    assert all((costs[:, rows, choice].sum(axis=1) <= capacities + 1e-9).all() for choice in stages)
    assert all(loss[rows, choice].sum() <= loss[rows, fits].sum() for choice in stages)


def test_one_budget_is_always_repaired() -> None:
    costs = np.array([[[1.0, 5.0], [2.0, 9.0]]])
    choice = repaired(np.array([1, 1]), np.zeros((2, 2)), costs, np.array([3.0]))
    assert choice is not None
    assert choice.tolist() == [0, 0]
    assert repaired(np.array([1, 1]), np.zeros((2, 2)), costs, np.array([2.9])) is None


def test_filling_takes_what_saves_most_of_what_fits() -> None:
    loss, costs = np.array([[5.0, 0.0], [4.0, 0.0]]), np.array([[[0.0, 2.0], [0.0, 2.0]]])
    assert filled(np.array([0, 0]), loss, costs, np.array([3.0])).tolist() == [1, 0]


def test_pairs_exchange_what_single_switches_cannot() -> None:
    """Room for one of the two: the first has it, the second would save more."""
    loss, costs = np.array([[5.0, 0.0], [9.0, 0.0]]), np.array([[[0.0, 2.0], [0.0, 2.0]]])
    at, capacity, reduced = np.array([1, 0]), np.array([2.0]), np.zeros((2, 2))
    assert filled(at, loss, costs, capacity).tolist() == [1, 0]
    assert paired(at, reduced, loss, costs, capacity).tolist() == [0, 1]
