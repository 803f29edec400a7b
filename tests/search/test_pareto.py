"""Dominance against its definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from search.pareto import undominated

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
