"""The integer program against enumeration, against HAWQ-V3's published configurations, and its honesty."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.budget import Bound
from search.cost import Cost
from search.errors import InfeasibleBudget
from search.ilp import check_jointly_feasible, frontier, solve
from search.lagrangian import allocate, price

Table = NDArray[np.float64]
HAWQ = json.loads((Path(__file__).parents[1] / "data" / "hawq_v3_resnet18.json").read_text())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, dict[str, Cost], list[Bound]]:
    """Up to 5 units × 3 schemes with one or two budgets, some choices closed; scales from 1e-12 to 1e6."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    units, schemes = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    closed = rng.random((units, schemes)) < 0.15
    closed[np.arange(units), rng.integers(0, schemes, units)] = False
    loss = rng.lognormal(0, 2, (units, schemes)) * 10.0 ** draw(st.integers(-12, 6))
    costs, bounds = {}, []
    for name in ("size_bytes", "bitops")[: draw(st.integers(1, 2))]:
        table = np.where(closed, np.inf, rng.integers(1, 50, (units, schemes)).astype(float))
        cost = Cost(name, table, float(rng.integers(0, 20)))
        costs[name] = cost
        reach = draw(st.floats(0.0, 1.0))
        bounds.append(Bound(name, name, cost.smallest + reach * (cost.largest - cost.smallest) - 0.5 * (reach < 0.1)))
    return loss, costs, bounds


def enumerate_best(loss: Table, costs: dict[str, Cost], bounds: list[Bound]) -> float | None:
    """The oracle: every allocation."""
    totals = [
        loss[np.arange(len(loss)), list(choice)].sum()
        for choice in itertools.product(range(loss.shape[1]), repeat=len(loss))
        if all(bound.admits(costs[bound.resource].total(np.array(choice))) for bound in bounds)
    ]
    return min(totals, default=None)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_solution_is_the_best_of_all_allocations(problem: tuple[Table, dict[str, Cost], list[Bound]]) -> None:
    loss, costs, bounds = problem
    best, solution = enumerate_best(loss, costs, bounds), solve(loss, costs, bounds)
    if best is None:
        assert solution.status == "infeasible"
        return
    assert solution.status == "optimal"
    assert solution.choice is not None
    assert solution.loss == pytest.approx(best, rel=2e-6)
    assert all(bound.admits(costs[bound.resource].total(solution.choice)) for bound in bounds)
    assert np.isfinite(costs[bounds[0].resource].table[np.arange(len(loss)), solution.choice]).all()


@pytest.mark.parametrize("limit", ["size", "bops", "latency"])
def test_hawq_v3s_resnet18_configurations_come_out(limit: str) -> None:
    """Yao et al. 2021: the inputs of the authors' integer program give the bits they published, layer by layer."""
    bits = np.array([4, 8])
    trace = np.array(HAWQ["average_hessian_trace"])
    loss = np.stack([trace * HAWQ["squared_weight_perturbation"][str(b)] for b in bits], axis=1)
    costs = {
        "size": np.outer(HAWQ["parameters_mi"], bits / 8),
        "bops": np.stack([HAWQ["gbops"][str(b)] for b in bits], axis=1),
        "latency": np.stack([HAWQ["latency_ms"][str(b)] for b in bits], axis=1),
    }
    # Layers that the authors tie are one unit here.
    tied = {second: first for first, second in HAWQ["ties"]}
    units = [layer for layer in range(len(trace)) if layer not in tied]
    members = [[unit, *(second for second, first in tied.items() if first == unit)] for unit in units]
    fold = lambda table: np.stack([table[member].sum(axis=0) for member in members])  # noqa: E731
    cost = Cost("size_bytes", fold(costs[limit]), 0.0)
    solution = solve(fold(loss), {"size_bytes": cost}, [Bound("size_mb", "size_bytes", HAWQ["limits"][limit])])
    assert solution.status == "optimal"
    assert solution.choice is not None
    found = {
        layer: int(bits[column]) for member, column in zip(members, solution.choice, strict=True) for layer in member
    }
    assert [found[layer] for layer in range(len(trace))] == HAWQ["published_bits"][limit]


def hard_problem(units: int = 120, schemes: int = 6) -> tuple[Table, dict[str, Cost], list[Bound]]:
    """Weights so alike that a solver must branch: strongly correlated knapsacks with three budgets."""
    rng = np.random.default_rng(7)
    costs = {}
    for name in ("size_bytes", "avg_bits", "bitops"):
        costs[name] = Cost(name, rng.integers(1000, 2000, (units, schemes)).astype(float), 0.0)
    loss = sum((2000 - cost.table for cost in costs.values()), np.zeros((units, schemes))) + 10
    bounds = [Bound(name, name, float(np.floor(cost.table.mean(axis=1).sum() * 0.97))) for name, cost in costs.items()]
    return loss, costs, bounds


def test_a_time_out_is_never_called_optimal() -> None:
    solution = solve(*hard_problem(), time_limit=1e-4)
    assert solution.status in ("feasible", "unsolved")
    if solution.choice is not None:
        assert solution.bound <= solution.loss


def test_an_optimum_without_any_loss_is_found() -> None:
    cost = Cost("avg_bits", np.array([[1.0, 2.0], [1.0, 2.0]]), 0.0)
    solution = solve(np.array([[0.0, 0.0], [1e-9, 0.0]]), {"avg_bits": cost}, [Bound("avg_bits", "avg_bits", 3.0)])
    assert (solution.status, solution.loss) == ("optimal", 0.0)


def test_a_frontier_steps_down_from_the_budget_and_trades_loss_for_cost() -> None:
    rng = np.random.default_rng(0)
    bits = np.array([2.0, 3, 4, 6, 8])
    size = rng.lognormal(0, 1, 30)
    cost = Cost("avg_bits", size[:, None] * bits / size.sum(), 0.0)
    loss = rng.lognormal(-3, 1, (30, 1)) * 4.0**-bits
    points = frontier(loss, {"avg_bits": cost}, [Bound("avg_bits", "avg_bits", 5.0)], "avg_bits", 12)
    totals = [cost.total(point.choice) for point in points if point.choice is not None]
    assert max(totals) <= 5.0 * (1 + 1e-9)
    assert min(totals) == pytest.approx(2.0)
    assert totals == sorted(totals, reverse=True)
    assert [point.loss for point in points] == sorted(point.loss for point in points)


def test_without_a_budget_the_frontier_reaches_from_end_to_end() -> None:
    cost = Cost("avg_bits", np.tile([2.0, 4.0, 8.0], (4, 1)) / 4, 0.0)
    loss = np.tile([9.0, 3.0, 1.0], (4, 1))
    totals = [
        cost.total(point.choice)
        for point in frontier(loss, {"avg_bits": cost}, [], "avg_bits", 5)
        if point.choice is not None
    ]
    assert (min(totals), max(totals)) == (2.0, 8.0)


def test_contradictory_budgets_are_refused_with_what_each_could_be() -> None:
    # Small in bytes is dear in bit operations, and the reverse.
    costs = {
        "size_bytes": Cost("size_bytes", np.array([[1e6, 3e6]]), 0.0),
        "bitops": Cost("bitops", np.array([[3e9, 1e9]]), 0.0),
    }
    bounds = [Bound("size_mb", "size_bytes", 2e6), Bound("gbitops", "bitops", 2e9)]
    with pytest.raises(InfeasibleBudget) as refused:
        check_jointly_feasible(costs, bounds)
    accepted = refused.value.problem()["accepted"]["minimum_given_the_others"]
    assert accepted == {"size_mb": pytest.approx(3.0), "gbitops": pytest.approx(3.0)}
    check_jointly_feasible(costs, [bounds[0], Bound("gbitops", "bitops", 3e9)])


@settings(max_examples=200, deadline=None)
@given(problems())
def test_prices_prove_a_bound_and_find_what_fits(problem: tuple[Table, dict[str, Cost], list[Bound]]) -> None:
    """However odd the problem; and no allocation loses less than the bound and what its choices lose above it."""
    loss, costs, bounds = problem
    best = enumerate_best(loss, costs, bounds)
    tables = [costs[bound.resource] for bound in bounds]
    open_ = np.isfinite(np.stack([cost.table for cost in costs.values()])).all(axis=0)
    within, priced = np.where(open_, loss, np.inf), np.stack([cost.table for cost in tables])
    capacities = np.array([bound.limit - cost.constant for bound, cost in zip(bounds, tables, strict=True)])
    found = price(within, priced, capacities)
    slack = 1e-9 * np.abs(loss).max()
    choice = allocate(found, within, priced, capacities)
    if best is None:
        assert choice is None
        return
    assert found.bound <= best + slack
    assert (found.prices >= 0).all()
    if choice is not None:
        rows = np.arange(len(loss))
        assert (priced[:, rows, choice].sum(axis=1) <= capacities * (1 + 1e-12)).all()
        assert found.bound + found.reduced[rows, choice].sum() <= loss[rows, choice].sum() + slack


def test_three_budgets_on_two_thousand_units_are_near_without_a_proof() -> None:
    rng, bits, units = np.random.default_rng(0), np.linspace(2, 8, 8), 2000
    size = rng.lognormal(0, 1, units)
    loss = rng.lognormal(-6, 2, units)[:, None] * 4.0**-bits * rng.lognormal(0, 0.2, (units, 8))
    tables = {
        "size_bytes": size[:, None] * bits,
        "bitops": (size * rng.lognormal(0, 0.7, units))[:, None] * bits,
        "avg_bits": rng.lognormal(0, 0.5, units)[:, None] * (1 + bits * rng.lognormal(0, 0.1, (units, 8))),
    }
    costs = {name: Cost(name, table, 0.0) for name, table in tables.items()}
    bounds = [
        Bound(name, name, cost.smallest + reach * (cost.largest - cost.smallest))
        for (name, cost), reach in zip(costs.items(), (0.4, 0.42, 0.45), strict=True)
    ]
    found = solve(loss, costs, bounds, prove=False)
    assert found.choice is not None
    assert found.gap <= 1e-4
    assert all(bound.admits(costs[bound.resource].total(found.choice)) for bound in bounds)
