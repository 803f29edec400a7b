"""The knapsack against enumeration; its relaxation against the linear program."""

import itertools

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search import knapsack
from search.knapsack import frontier, relax, solve

Table = NDArray[np.float64]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, Table, float]:
    """Losses, costs and a capacity of up to 6 units × 4 schemes: some choices closed; ties, zeros and negative numbers
    among them; scales from 1e-12 to 1e9."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["skewed", "tied", "signed"]))
    loss = rng.integers(0, 4, shape).astype(float) if kind == "tied" else rng.lognormal(0, 2, shape)
    cost = rng.integers(0, 15, shape).astype(float)
    if kind == "signed":
        loss, cost = loss - 2, cost - 6
    loss *= 10.0 ** draw(st.integers(-12, 9))
    closed = rng.random(shape) < 0.15
    closed[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = False
    cost[closed] = np.inf
    least, most = cost.min(axis=1).sum(), np.where(closed, -np.inf, cost).max(axis=1).sum()
    return loss, cost, float(np.floor(least + draw(st.floats(-0.1, 1.1)) * (most - least)))


def enumerated(loss: Table, cost: Table, capacity: float) -> float | None:
    """The oracle: the least loss of all allocations that fit."""
    rows = np.arange(len(loss))
    totals = [
        (cost[rows, choice].sum(), loss[rows, choice].sum())
        for choice in map(list, itertools.product(range(loss.shape[1]), repeat=len(loss)))
    ]
    return min((lost for spent, lost in totals if spent <= capacity), default=None)


def network(units: int, widths: tuple[int, ...], seed: int) -> tuple[Table, Table]:
    """Losses that fall as 4^−bits, with noise, and bits weighted by uneven sizes."""
    rng = np.random.default_rng(seed)
    bits, size = np.array(widths, dtype=float), rng.lognormal(0, 1, units)
    loss = rng.lognormal(-6, 2, units)[:, None] * 4.0**-bits * rng.lognormal(0, 0.2, (units, len(bits)))
    return loss, size[:, None] * bits / size.sum()


@settings(max_examples=500, deadline=None)
@given(problems())
def test_the_solution_is_the_best_of_all_allocations(problem: tuple[Table, Table, float]) -> None:
    loss, cost, capacity = problem
    best, found = enumerated(loss, cost, capacity), solve(loss, cost, capacity)
    if best is None:
        assert found.status == "infeasible"
        return
    assert found.status == "optimal"
    assert found.choice is not None
    rows = np.arange(len(loss))
    assert cost[rows, found.choice].sum() <= capacity
    assert loss[rows, found.choice].sum() == pytest.approx(found.objective, rel=1e-12)
    scale = np.abs(loss[np.isfinite(loss)]).max()
    assert found.objective == pytest.approx(best, rel=2 * knapsack.GAP, abs=1e-12 * scale)
    assert found.bound <= best + 1e-12 * scale


@settings(max_examples=100, deadline=None)
@given(problems())
def test_without_a_proof_the_stated_gap_holds(problem: tuple[Table, Table, float]) -> None:
    loss, cost, capacity = problem
    best, found = enumerated(loss, cost, capacity), solve(loss, cost, capacity, prove=False)
    if best is None:
        assert found.status == "infeasible"
        return
    assert found.choice is not None
    scale = 1e-12 * np.abs(loss[np.isfinite(loss)]).max()
    assert cost[np.arange(len(loss)), found.choice].sum() <= capacity
    assert found.bound - scale <= best <= found.objective + scale


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_relaxation_is_the_linear_programs(problem: tuple[Table, Table, float]) -> None:
    loss, cost, capacity = problem
    scale = np.abs(loss).max() or 1.0
    program = pulp.LpProblem("relaxation", pulp.LpMinimize)
    x = {(u, s): program.add_variable(f"x_{u}_{s}", 0, 1) for u, s in np.ndindex(loss.shape) if np.isfinite(cost[u, s])}
    program += pulp.lpSum(float(loss[at] / scale) * one for at, one in x.items())
    for unit in range(len(loss)):
        program += pulp.lpSum(one for (u, _), one in x.items() if u == unit) == 1
    program += pulp.lpSum(float(cost[at]) * one for at, one in x.items()) <= capacity
    program.solve(pulp.HiGHS(msg=False))
    bound = relax(loss, cost).bound(capacity)
    if program.sol_status == pulp.LpSolutionInfeasible:
        assert bound == np.inf
    else:
        assert bound / scale == pytest.approx(pulp.value(program.objective), rel=1e-6, abs=1e-7)


def test_the_relaxation_is_convex_and_falls() -> None:
    loss, cost = network(40, (2, 3, 4, 6, 8), seed=1)
    found = relax(loss, cost)
    assert (np.diff(found.costs) > 0).all()
    assert (np.diff(found.losses) < 0).all()
    slopes = np.diff(found.losses) / np.diff(found.costs)
    assert (np.diff(slopes) >= -1e-9 * np.abs(slopes[1:])).all()


def test_at_a_breakpoint_the_relaxation_is_an_allocation() -> None:
    loss, cost = network(30, (2, 3, 4, 6, 8), seed=2)
    found, rows = relax(loss, cost), np.arange(30)
    for k in range(len(found.costs)):
        choice = found.choice(k)
        assert cost[rows, choice].sum() == pytest.approx(found.costs[k])
        assert loss[rows, choice].sum() == pytest.approx(found.losses[k])
    assert found.price(found.costs[-1]) == 0.0


def test_a_point_above_the_hull_is_found_when_only_it_fits() -> None:
    """The middle scheme is on no hull, and the best within 5."""
    loss, cost = np.array([[10.0, 9.0, 0.0]]), np.array([[0.0, 5.0, 10.0]])
    found = solve(loss, cost, 9.0)
    assert found.choice is not None
    assert found.choice.tolist() == [1]
    assert found.status == "optimal"


@pytest.mark.parametrize("seed", range(3))
def test_a_frontier_is_proved_optimal_at_every_capacity(seed: int) -> None:
    """All 50 of 224 units × 6 schemes; and what is found without a proof is near them."""
    loss, cost = network(224, (2, 3, 4, 5, 6, 8), seed)
    capacities = np.linspace(2.001, 8.0, 50)
    found = frontier(loss, cost, capacities)
    assert {point.status for point in found} == {"optimal"}
    assert max(point.gap for point in found) <= 2 * knapsack.GAP
    assert (np.diff([point.objective for point in found]) <= 0).all()
    near = frontier(loss, cost, capacities, prove=False)
    assert all(one.objective >= best.objective * (1 - knapsack.GAP) for one, best in zip(near, found, strict=True))
    assert np.median([point.gap for point in near]) <= 1e-3


def test_a_wider_gap_is_proved_where_it_is_asked_for() -> None:
    loss, cost = network(224, (2, 3, 4, 5, 6, 8), seed=0)
    capacities = np.linspace(2.001, 8.0, 20)
    best = frontier(loss, cost, capacities)
    for point, exact in zip(frontier(loss, cost, capacities, gap=1e-2), best, strict=True):
        assert point.status == "optimal"
        assert point.gap <= 1.01e-2
        assert point.bound <= exact.objective * (1 + knapsack.GAP)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_no_number_is_refused_with_its_place(value: float) -> None:
    loss = np.array([[1.0, 2.0], [value, 2.0]])
    for call in (lambda: solve(loss, np.ones((2, 2)), 9.0), lambda: frontier(loss, np.ones((2, 2)), [9.0])):
        with pytest.raises(ValueError, match=f"the loss of unit 1 at scheme 0 is {value}"):
            call()


def test_a_hundred_thousand_units_are_solved_to_a_ten_thousandth() -> None:
    loss, cost = network(100_000, (2, 3, 4, 8), seed=0)
    assert solve(loss, cost, 4.25).gap <= 1e-4


def test_when_states_run_out_the_gap_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, cost = network(60, (2, 3, 4, 6, 8), seed=3)
    best = solve(loss, cost, 4.1)
    monkeypatch.setattr(knapsack, "MOST_STATES", 1)
    found = solve(loss, cost, 4.1)
    assert (found.status, best.status) == ("feasible", "optimal")
    assert found.bound <= best.objective <= found.objective


class TestEdges:
    def test_one_scheme_or_pinned_units_leave_one_allocation(self) -> None:
        loss = np.array([[1.0, 5.0], [2.0, 0.5]])
        cost = np.array([[1.0, np.inf], [np.inf, 4.0]])
        assert solve(loss, cost, 5.0).objective == 1.5
        assert solve(loss, cost, 4.9).status == "infeasible"

    def test_a_unit_without_an_open_choice_makes_it_infeasible(self) -> None:
        loss, cost = np.array([[1.0], [np.inf]]), np.ones((2, 1))
        assert solve(loss, cost, 9.0).status == "infeasible"
        assert [point.status for point in frontier(loss, cost, [1.0, 9.0])] == ["infeasible"] * 2

    def test_a_capacity_that_admits_everything_gives_every_unit_its_best(self) -> None:
        loss, cost = network(20, (2, 4, 8), seed=4)
        found = solve(loss, cost, 1e9)
        assert found.choice is not None
        assert found.choice.tolist() == loss.argmin(axis=1).tolist()

    def test_of_equal_costs_the_least_loss_is_taken(self) -> None:
        assert solve(np.array([[3.0, 1.0, 2.0]]), np.ones((1, 3)), 1.0).objective == 1.0


@pytest.mark.parametrize("power", [10, 12, 14, 16])
def test_a_huge_loss_that_the_budget_avoids_leaves_the_bound_true(power: int) -> None:
    rng = np.random.default_rng(power)
    for _ in range(40):
        loss, cost = rng.lognormal(-2, 3, (7, 3)), rng.integers(1, 6, (7, 3)).astype(float)
        loss[0, cost[0].argmin()] = 10.0**power
        capacity = float(rng.uniform(cost.min(axis=1).sum() + 1, cost.max(axis=1).sum()))
        found = solve(loss, cost, capacity)
        choices = np.array(list(itertools.product(range(3), repeat=7)))
        totals = np.where(cost[np.arange(7), choices].sum(1) <= capacity, loss[np.arange(7), choices].sum(1), np.inf)
        assert found.bound <= totals.min() * (1 + 1e-9)
        if found.status == "optimal":
            assert found.objective <= totals.min() * (1 + 2e-6)


@pytest.mark.filterwarnings("error")
def test_nothing_to_lose_and_a_closed_choice_give_no_warning() -> None:
    loss = np.array([[1, 0.3, 0], [1, 0.2, 0], [1, 0.1, 0.0]])
    cost = np.array([[np.inf, 1, 2], [0, 1, 2], [0, 1, 2.0]])
    found = solve(loss, cost, 100.0)
    assert found.choice is not None
    assert found.choice.tolist() == [2, 2, 2]
