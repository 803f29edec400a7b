"""Dominance, and the volume that it covers, against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from search.pareto import best_under, hypervolume, knee, undominated

points = st.integers(1, 3).flatmap(
    lambda objectives: arrays(
        np.float64, st.tuples(st.integers(0, 12), st.just(objectives)), elements=st.integers(0, 4)
    )
)


@given(points)
def test_kept_points_are_exactly_those_that_no_other_dominates(objectives: np.ndarray) -> None:
    keep = undominated(objectives)
    for row, point in enumerate(objectives):
        dominated = any((other <= point).all() and (other < point).any() for other in objectives)
        earlier_twin = any((other == point).all() for other in objectives[:row])
        assert keep[row] == (not dominated and not earlier_twin)


def test_a_point_without_a_value_is_never_kept_and_dominates_nothing() -> None:
    keep = undominated(np.array([[np.nan, 0.0], [1.0, 1.0]]))
    assert keep.tolist() == [False, True]


@given(points)
def test_the_hypervolume_is_the_number_of_unit_cells_dominated(objectives: np.ndarray) -> None:
    """On integers up to a corner of 4, every unit cell lies wholly inside or outside."""
    dimensions = objectives.shape[1]
    cells = np.stack(np.meshgrid(*[np.arange(4)] * dimensions, indexing="ij"), axis=-1).reshape(-1, dimensions)
    covered = (objectives[None] <= cells[:, None]).all(axis=-1).any(axis=1).sum()
    assert hypervolume(objectives, np.full(dimensions, 4.0)) == pytest.approx(covered)


@given(points, st.integers(0, 99))
def test_the_hypervolume_knows_no_order_and_no_worse_points(objectives: np.ndarray, seed: int) -> None:
    reference = np.full(objectives.shape[1], 5.0)
    shuffled = objectives[np.random.default_rng(seed).permutation(len(objectives))]
    with_worse = np.concatenate([shuffled, objectives + 1, np.full((1, objectives.shape[1]), np.nan)])
    assert hypervolume(with_worse, reference) == pytest.approx(hypervolume(objectives, reference))


def test_the_knee_is_where_the_frontier_bends_most() -> None:
    frontier = np.array([[4.0, 0.0], [0.0, 8.0], [1.0, 2.0], [2.0, 1.9], [3.0, 9.0], [np.nan, 0.0]])
    assert knee(frontier) == 2
    assert knee(frontier[:2]) is None
    assert knee(np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])) is None
    assert knee(np.array([[0.0, 2.0], [1.5, 1.5], [2.0, 0.0]])) is None


class TestBestUnder:
    costs = np.array([[4.0, 1.0], [3.0, 2.0], [3.0, 2.0], [5.0, 0.0]])

    def test_it_keeps_every_limit(self) -> None:
        assert best_under(np.array([1.0, 2.0, 2.0, 0.5]), self.costs, np.array([4.0, 2.0])) == 0
        assert best_under(np.array([1.0, 2.0, 2.0, 0.5]), self.costs, np.array([3.0, 2.0])) == 1
        assert best_under(np.array([1.0, 2.0, 2.0, 0.5]), self.costs, np.array([2.0, 2.0])) is None

    def test_of_equal_values_the_cheaper_wins_and_what_has_none_never_does(self) -> None:
        assert best_under(np.array([1.0, 1.0, np.nan, np.nan]), self.costs, np.array([9.0, 9.0])) == 1
