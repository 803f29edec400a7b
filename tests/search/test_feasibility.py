"""Budgets that cannot be met are refused with what they could be, against enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.budget import Bound, cost_bounds
from search.cost import Cost, cost_tables
from search.errors import InfeasibleBudget
from search.feasibility import check_feasible, minimal_conflict
from tests.search.spaces import decoder, space

MODEL = decoder()
COSTS = cost_tables(space(MODEL), MODEL)
RESOURCES = {"size_mb": "size_bytes", "gbitops": "bitops", "avg_bits": "avg_bits"}
SCALES = {"size_mb": 1e6, "gbitops": 1e9, "avg_bits": 1.0}


@pytest.mark.parametrize(("name", "value"), [("avg_bits", 4.4), ("size_mb", 0.1), ("gbitops", 0.0001)])
def test_an_infeasible_budget_is_refused_with_the_smallest_feasible_value(name: str, value: float) -> None:
    with pytest.raises(InfeasibleBudget) as refused:
        check_feasible(COSTS, cost_bounds({name: value}))
    problem = refused.value.problem()
    assert problem["field"] == f"budgets.{name}"
    smallest = problem["accepted"]["minimum"]
    assert smallest > value
    check_feasible(COSTS, cost_bounds({name: smallest}))
    with pytest.raises(InfeasibleBudget):
        check_feasible(COSTS, cost_bounds({name: smallest * 0.99999}))


def test_budgets_that_everything_meets_are_no_error() -> None:
    check_feasible(COSTS, [])
    check_feasible(COSTS, cost_bounds({"avg_bits": 16.0, "size_mb": 1e9, "gbitops": 1e9, "loss_increase": 1e-9}))


def test_the_same_budget_twice_is_refused_like_the_tighter() -> None:
    two = [*cost_bounds({"avg_bits": 8.0}), *cost_bounds({"avg_bits": 4.4})]
    with pytest.raises(InfeasibleBudget, match=r"avg_bits = 4\.4 .* is 4\.5 bits"):
        check_feasible(COSTS, two)
    check_feasible(COSTS, [*two[:1], *cost_bounds({"avg_bits": 4.5})])


def test_of_several_infeasible_budgets_each_is_named_with_its_smallest_feasible_value() -> None:
    bounds = cost_bounds({"avg_bits": 0.1, "size_mb": 1e-6})
    with pytest.raises(InfeasibleBudget) as refused:
        check_feasible(COSTS, bounds)
    problem = refused.value.problem()
    least = problem["accepted"]["minimum"]
    assert problem["field"] == "budgets"
    assert problem["value"] == {"avg_bits": 0.1, "size_mb": 1e-6}
    check_feasible(COSTS, cost_bounds(least))
    assert all(f"{least[name]:g}" in problem["detail"] for name in ("avg_bits", "size_mb"))


def test_contradictory_budgets_are_refused_with_what_each_could_be() -> None:
    # Small in bytes is dear in bit operations, and the reverse.
    costs = {
        "size_bytes": Cost("size_bytes", np.array([[1e6, 3e6]]), 0.0),
        "bitops": Cost("bitops", np.array([[3e9, 1e9]]), 0.0),
        "avg_bits": Cost("avg_bits", np.array([[4.0, 8.0]]), 0.0),
    }
    bounds = cost_bounds({"avg_bits": 8.0, "size_mb": 2.0, "gbitops": 2.0})
    with pytest.raises(InfeasibleBudget, match=r"size_mb ≥ 3 while the others hold, gbitops ≥ 3 while") as refused:
        check_feasible(costs, bounds)
    problem = refused.value.problem()
    assert problem["value"] == {"size_mb": 2.0, "gbitops": 2.0}, "the budget on avg_bits has no part in it"
    assert problem["accepted"] == {"minimum_given_the_others": {"size_mb": 3.0, "gbitops": 3.0}}
    check_feasible(costs, cost_bounds({"avg_bits": 8.0, "size_mb": 2.0, "gbitops": 3.0}))


@st.composite
def contradictions(draw: st.DrawFn) -> tuple[dict[str, Cost], list[Bound]]:
    """Two or three budgets on few units, each of which can be met alone."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    costs = {
        name: Cost(name, rng.integers(0, 20, shape).astype(float), float(rng.integers(0, 5)))
        for name in RESOURCES.values()
    }
    bounds = []
    for name in list(RESOURCES)[: draw(st.integers(2, 3))]:
        cost = costs[RESOURCES[name]]
        reach = draw(st.floats(0, 0.4)) * (cost.largest - cost.smallest)
        bounds.append(Bound(name, cost.resource, float(np.floor(cost.smallest + reach)) + 0.5))
    return costs, bounds


def can_hold(costs: dict[str, Cost], bounds: list[Bound]) -> bool:
    """The oracle: every allocation."""
    units, schemes = costs["avg_bits"].table.shape
    return any(
        all(bound.admits(costs[bound.resource].total(np.array(choice))) for bound in bounds)
        for choice in itertools.product(range(schemes), repeat=units)
    )


@settings(max_examples=80, deadline=None)
@given(contradictions())
def test_the_budgets_named_conflict_and_without_any_of_them_the_rest_can_be_met(
    problem: tuple[dict[str, Cost], list[Bound]],
) -> None:
    costs, bounds = problem
    if can_hold(costs, bounds):
        check_feasible(costs, bounds)
        return
    conflict = minimal_conflict(costs, bounds)
    assert not can_hold(costs, conflict)
    assert all(can_hold(costs, [other for other in conflict if other is not bound]) for bound in conflict)
    with pytest.raises(InfeasibleBudget) as refused:
        check_feasible(costs, bounds)
    minimum = refused.value.problem()["accepted"]["minimum_given_the_others"]
    assert list(minimum) == [bound.budget for bound in conflict]
    for bound in conflict:
        others = [other for other in bounds if other is not bound]
        if can_hold(costs, others):
            least = minimum[bound.budget] * SCALES[bound.budget]
            assert can_hold(costs, [*others, Bound(bound.budget, bound.resource, least)])
            assert not can_hold(costs, [*others, Bound(bound.budget, bound.resource, least * (1 - 2e-6) - 1e-6)])
