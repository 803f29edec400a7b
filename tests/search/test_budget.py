"""Budgets are hard, and written in a person's units."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.budget import Bound, cost_bounds
from search.cost import Cost


@pytest.mark.parametrize("limit", [4.25, -4.25])
def test_a_budget_admits_what_meets_it_exactly_and_nothing_above(limit: float) -> None:
    bound = Bound("avg_bits", "avg_bits", limit)
    assert bound.admits(limit)
    assert bound.admits(limit + abs(limit) * 1e-15)
    assert not bound.admits(limit + 1e-6)


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_what_fits_the_capacity_is_admitted_whatever_the_constant(limit: float, constant: float) -> None:
    bound = Bound("size_mb", "size_bytes", limit)
    rest = bound.capacity(Cost("size_bytes", np.zeros((1, 1)), constant))
    assert bound.admits(constant + rest) or abs(limit) < 1e-6 * abs(constant)


def test_bounds_are_in_the_units_of_the_costs_and_name_their_budget() -> None:
    size, operations = cost_bounds({"size_mb": 70.0, "gbitops": 2.0, "loss_increase": 0.1})
    assert (size.resource, size.limit, size.name) == ("size_bytes", 70e6, "size_mb")
    assert (operations.resource, operations.limit, operations.value(1e9)) == ("bitops", 2e9, 1.0)
    (part,) = cost_bounds({"avg_bits": 6.25}, of="*.down_proj")
    assert (part.resource, part.name) == ("avg_bits of *.down_proj", "limits.*.down_proj.avg_bits")
