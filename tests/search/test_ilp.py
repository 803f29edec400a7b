"""The integer program against enumeration, against HAWQ-V3's published configurations, and its honesty."""

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pulp
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search import ilp
from search.budget import Bound
from search.cost import Cost
from search.ilp import levels
from search.knapsack import Solution
from search.lagrangian import allocate, price
from tests.aside import PATIENCE

Table = NDArray[np.float64]
HAWQ = json.loads((Path(__file__).parents[1] / "data" / "hawq_v3_resnet18.json").read_text())


# Solvers' time limits are of the wall clock, and a busy machine may stand still for longer than they are.
solve, frontier = (partial(one, time_limit=PATIENCE) for one in (ilp.solve, ilp.frontier))

NAMES = ("size_bytes", "bitops", "avg_bits", "latency_us")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, dict[str, Cost], list[Bound]]:
    """Up to 5 units × 3 schemes with any number of budgets, some choices closed.

    Ties, zero and negative costs, equal schemes, proportional costs and the same budget twice among them; losses at
    scales from 1e-12 to 1e6.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    units, schemes = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    closed = rng.random((units, schemes)) < 0.15
    closed[np.arange(units), rng.integers(0, schemes, units)] = False
    loss = rng.lognormal(0, 2, (units, schemes)) * 10.0 ** draw(st.integers(-12, 6))
    least = draw(st.sampled_from([1, 0, -20]))
    costs, bounds = {}, []
    for name in NAMES[: draw(st.integers(0, 4))]:
        table = np.where(closed, np.inf, rng.integers(least, 50, (units, schemes)).astype(float))
        costs[name] = Cost(name, table, float(rng.integers(0, 20)))
        bounds.append(bound_at(costs[name], draw(st.floats(0.0, 1.0))))
    if not costs:
        costs["size_bytes"] = Cost("size_bytes", np.where(closed, np.inf, 1.0), 0.0)
    match draw(st.sampled_from(["", "equal schemes", "proportional", "twice"])):
        case "equal schemes":
            for table in (loss, *(cost.table for cost in costs.values())):
                table[:, -1] = table[:, 0]
        case "proportional":
            costs["more"] = Cost("more", costs["size_bytes"].table * 0.7, 3.0)
            bounds.append(bound_at(costs["more"], draw(st.floats(0.0, 1.0))))
        case "twice" if bounds:
            bounds.append(replace(bounds[0], limit=bounds[0].limit + draw(st.integers(-5, 5))))
    return loss, costs, bounds


def bound_at(cost: Cost, reach: float) -> Bound:
    """From just below what all units can reach to what they all could take; never on an allocation's total."""
    limit = cost.smallest + reach * (cost.largest - cost.smallest)
    return Bound(cost.resource, cost.resource, float(np.floor(limit)) + (0.5 if reach > 0.1 else -0.5))


def enumerate_best(objective: Cost, loss: Table, costs: dict[str, Cost], bounds: list[Bound]) -> float | None:
    """The oracle: every allocation."""
    tables = costs | {"loss": Cost("loss", loss, 0.0)}
    totals = [
        objective.total(choice)
        for choice in map(np.array, itertools.product(range(loss.shape[1]), repeat=len(loss)))
        if all(bound.admits(tables[bound.resource].total(choice)) for bound in bounds)
        and all(np.isfinite(cost.total(choice)) for cost in tables.values())
    ]
    return min(totals, default=None)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_solution_is_the_best_of_all_allocations(problem: tuple[Table, dict[str, Cost], list[Bound]]) -> None:
    loss, costs, bounds = problem
    objective = Cost("loss", loss, 0.0)
    best, solution = enumerate_best(objective, loss, costs, bounds), solve(loss, costs, bounds)
    if best is None:
        assert solution.status == "infeasible"
        return
    assert solution.status == "optimal"
    assert solution.choice is not None
    assert solution.objective == pytest.approx(best, rel=2e-6)
    assert objective.total(solution.choice) == pytest.approx(solution.objective, rel=1e-12)
    assert all(bound.admits(costs[bound.resource].total(solution.choice)) for bound in bounds)
    assert all(np.isfinite(cost.total(solution.choice)) for cost in costs.values())


@settings(max_examples=200, deadline=None)
@given(problems(), st.floats(0.0, 1.0))
def test_a_cost_is_minimised_within_the_budgets_and_a_loss(
    problem: tuple[Table, dict[str, Cost], list[Bound]], reach: float
) -> None:
    """The smallest model that loses at most so much."""
    loss, costs, bounds = problem
    objective, total = costs["size_bytes"], Cost("loss", loss, 0.0)
    most = (total.smallest + reach * (total.largest - total.smallest)) * (1 + 1e-4)
    best = enumerate_best(objective, loss, costs, [*bounds, Bound("loss_increase", "loss", most)])
    solution = solve(loss, costs, bounds, minimise="size_bytes", most_loss=most)
    if best is None:
        assert solution.status == "infeasible"
        return
    assert solution.status == "optimal"
    assert solution.choice is not None
    assert solution.objective == pytest.approx(best, rel=2e-6, abs=1e-4)
    assert total.total(solution.choice) <= most * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_without_a_proof_the_stated_gap_holds(problem: tuple[Table, dict[str, Cost], list[Bound]]) -> None:
    loss, costs, bounds = problem
    best = enumerate_best(Cost("loss", loss, 0.0), loss, costs, bounds)
    solution = solve(loss, costs, bounds, prove=False)
    if best is None:
        assert solution.status == "infeasible"
        return
    assert solution.choice is not None
    assert solution.bound * (1 - 1e-9) <= best <= solution.objective * (1 + 1e-9)


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
        assert solution.bound <= solution.objective


def test_an_optimum_without_any_loss_is_found() -> None:
    cost = Cost("avg_bits", np.array([[1.0, 2.0], [1.0, 2.0]]), 0.0)
    solution = solve(np.array([[0.0, 0.0], [1e-9, 0.0]]), {"avg_bits": cost}, [Bound("avg_bits", "avg_bits", 3.0)])
    assert (solution.status, solution.objective) == ("optimal", 0.0)


def network(units: int, widths: tuple[int, ...], seed: int = 0) -> tuple[Table, dict[str, Cost]]:
    """Losses that fall as 4^−bits, with noise; average bits, size and bit operations of layers of uneven sizes."""
    rng = np.random.default_rng(seed)
    bits, size = np.array(widths, dtype=float), rng.lognormal(0, 1, units)
    loss = rng.lognormal(-6, 2, (units, 1)) * 4.0**-bits * rng.lognormal(0, 0.2, (units, len(bits)))
    average = size[:, None] * bits / size.sum()
    operations = (size * rng.lognormal(0, 0.7, units))[:, None] * bits
    return loss, {
        "avg_bits": Cost("avg_bits", average, 0.0),
        "size_bytes": Cost("size_bytes", average * 1000, 50.0),
        "bitops": Cost("bitops", operations, 0.0),
    }


def totals(cost: Cost, points: list[Solution]) -> list[float]:
    return [cost.total(point.choice) for point in points if point.choice is not None]


class TestFrontier:
    def test_it_steps_down_from_the_budget_and_trades_loss_for_cost(self) -> None:
        loss, costs = network(30, (2, 3, 4, 6, 8))
        bounds = [Bound("avg_bits", "avg_bits", 5.0)]
        points = frontier(loss, costs, bounds, "avg_bits", levels(costs, bounds, "avg_bits", 12))
        found = totals(costs["avg_bits"], points)
        assert max(found) <= 5.0 * (1 + 1e-9)
        assert min(found) == pytest.approx(2.0)
        assert found == sorted(found, reverse=True)
        assert [point.objective for point in points] == sorted(point.objective for point in points)

    def test_without_a_budget_it_reaches_from_end_to_end(self) -> None:
        cost = Cost("avg_bits", np.tile([2.0, 4.0, 8.0], (4, 1)) / 4, 0.0)
        loss = np.tile([9.0, 3.0, 1.0], (4, 1))
        costs = {"avg_bits": cost}
        points = frontier(loss, costs, [], "avg_bits", levels(costs, [], "avg_bits", 5))
        assert (min(totals(cost, points)), max(totals(cost, points))) == (2.0, 8.0)

    @pytest.mark.parametrize("also", [[], [Bound("size_mb", "size_bytes", 4550.0)], [Bound("gbitops", "bitops", 195)]])
    def test_each_point_is_what_solving_its_level_gives(self, also: list[Bound]) -> None:
        """With one budget, with another on a proportional cost, with another."""
        loss, costs = network(30, (2, 3, 4, 6, 8))
        at = [5.0, 4.4, 3.1]
        points = frontier(loss, costs, [Bound("avg_bits", "avg_bits", 4.8), *also], "avg_bits", at)
        for level, point in zip([4.8, 4.4, 3.1], points, strict=True):
            alone = solve(loss, costs, [Bound("avg_bits", "avg_bits", level), *also])
            assert point.status == alone.status == "optimal"
            assert point.objective == pytest.approx(alone.objective, rel=2e-6)

    def test_levels_begin_at_the_budget_and_end_where_the_other_budgets_allow(self) -> None:
        """The first scheme is the smaller, the second takes fewer operations."""
        costs = {
            "size_bytes": Cost("size_bytes", np.tile([1.0, 3.0], (4, 1)), 0.0),
            "bitops": Cost("bitops", np.tile([3.0, 1.0], (4, 1)), 0.0),
        }
        bounds = [Bound("size_mb", "size_bytes", 11.0), Bound("gbitops", "bitops", 8.0)]
        assert levels(costs, bounds, "size_bytes", 4).tolist() == pytest.approx([11, 10, 9, 8])
        assert levels(costs, bounds, "size_bytes", 1).tolist() == [11.0]

    def test_without_a_proof_every_point_states_its_gap(self) -> None:
        loss, costs = network(224, (2, 3, 4, 5, 6, 8))
        points = frontier(loss, costs, [], "avg_bits", levels(costs, [], "avg_bits", 50), prove=False)
        assert np.median([point.gap for point in points]) <= 1e-3

    def test_infeasible_levels_are_left_out(self) -> None:
        loss, costs = network(10, (4, 8))
        assert frontier(loss, costs, [], "avg_bits", [3.9]) == []


class TestEdges:
    cost = Cost("avg_bits", np.array([[1.0, 2.0], [1.0, 2.0]]), 0.5)

    def solved(self, loss: Table, *bounds: Bound, **costs: Cost) -> Solution:
        return solve(loss, {"avg_bits": self.cost} | costs, bounds)

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    @pytest.mark.parametrize("budgets", [0, 1, 2])
    def test_what_is_no_number_is_refused_with_its_place(self, value: float, budgets: int) -> None:
        bounds = [Bound("avg_bits", "avg_bits", 9.0), Bound("gbitops", "bitops", 9.0)][:budgets]
        bitops = Cost("bitops", np.array([[1.0, 1.0], [2.0, 1.0]]), 0.0)
        with pytest.raises(ValueError, match=f"the loss of unit 1 at scheme 0 is {value}; accepted: a number, or inf"):
            self.solved(np.array([[1.0, 2.0], [value, 2.0]]), *bounds, bitops=bitops)
        broken = Cost("bitops", np.array([[1.0, value], [2.0, 1.0]]), 0.0)
        with pytest.raises(ValueError, match=f"the bitops of unit 0 at scheme 1 is {value}"):
            self.solved(np.ones((2, 2)), *bounds, bitops=broken)

    def test_an_infinite_loss_or_cost_closes_a_choice_whatever_else_stands_there(self) -> None:
        closed = Cost("avg_bits", np.array([[np.inf, 2.0], [1.0, 2.0]]), 0.0)
        solution = self.solved(np.array([[np.nan, 5.0], [np.inf, 1.0]]), avg_bits=closed)
        assert solution.choice is not None
        assert solution.choice.tolist() == [1, 1]
        assert self.solved(np.full((2, 2), np.inf)).status == "infeasible"

    def test_a_budget_that_everything_meets_leaves_each_unit_its_best(self) -> None:
        loss = np.array([[1.0, 2.0], [3.0, 2.0]])
        for bounds in ([], [Bound("avg_bits", "avg_bits", 4.5)], [Bound("avg_bits", "avg_bits", 1e9)]):
            solution = self.solved(loss, *bounds)
            assert (solution.status, solution.objective) == ("optimal", 3.0)

    def test_a_budget_that_nothing_meets_is_infeasible(self) -> None:
        assert self.solved(np.ones((2, 2)), Bound("avg_bits", "avg_bits", 2.49)).status == "infeasible"
        assert self.solved(np.ones((2, 2)), Bound("avg_bits", "avg_bits", 2.5)).status == "optimal"

    @pytest.mark.parametrize("budgets", [1, 2])
    def test_where_all_units_are_pinned_or_there_is_one_scheme_one_allocation_is_left(self, budgets: int) -> None:
        pinned = np.array([[0.0, np.inf], [np.inf, 0.0]])
        for table in (self.cost.table + pinned, self.cost.table[:, 1:]):
            costs = {"avg_bits": Cost("avg_bits", table, 0.0), "bitops": Cost("bitops", table**2, 0.0)}
            bounds = [Bound("avg_bits", "avg_bits", 4.0), Bound("gbitops", "bitops", 8.0)][:budgets]
            assert solve(np.ones(table.shape), costs, bounds).objective == 2.0
            tight = [replace(bound, limit=1.9) for bound in bounds]
            assert solve(np.ones(table.shape), costs, tight).status == "infeasible"

    @pytest.mark.parametrize("shape", [(0, 2), (0, 0)])
    @pytest.mark.parametrize("budgets", [0, 1, 2])
    def test_an_empty_space_has_the_empty_allocation_which_costs_the_constant(
        self, shape: tuple[int, int], budgets: int
    ) -> None:
        costs = {name: Cost(name, np.zeros(shape), 3.0) for name in ("avg_bits", "bitops")}
        bounds = [Bound("avg_bits", "avg_bits", 3.0), Bound("gbitops", "bitops", 3.0)][:budgets]
        solution = solve(np.zeros(shape), costs, bounds)
        assert (solution.status, solution.objective) == ("optimal", 0.0)
        assert solution.choice is not None
        assert solution.choice.tolist() == []
        assert solve(np.zeros(shape), costs, [Bound("avg_bits", "avg_bits", 2.9)]).status == "infeasible"

    def test_costs_of_zero_bound_nothing(self) -> None:
        free = Cost("bitops", np.zeros((2, 2)), 0.0)
        within = Bound("avg_bits", "avg_bits", 3.5)
        solution = self.solved(np.array([[2.0, 1.0], [5.0, 1.0]]), Bound("gbitops", "bitops", 0.0), within, bitops=free)
        assert (solution.status, solution.objective) == ("optimal", 3.0)


BELOW_NOTHING = (
    np.array([[0.275]]),
    {"size_bytes": Cost("size_bytes", np.array([[-5.0]]), 4.0), "more": Cost("more", np.array([[-3.5]]), 3.0)},
    [Bound("size_bytes", "size_bytes", -0.5), Bound("more", "more", -0.5)],
)
"""Capacities below 0, one of them met exactly."""


@settings(max_examples=200, deadline=None)
@example(BELOW_NOTHING)
@given(problems().filter(lambda problem: bool(problem[2])))
def test_prices_prove_a_bound_and_find_what_fits(problem: tuple[Table, dict[str, Cost], list[Bound]]) -> None:
    """However odd the problem; and no allocation loses less than the bound and what its choices lose above it."""
    loss, costs, bounds = problem
    best = enumerate_best(Cost("loss", loss, 0.0), loss, costs, bounds)
    tables = [costs[bound.resource] for bound in bounds]
    open_ = np.isfinite(np.stack([cost.table for cost in costs.values()])).all(axis=0)
    assume(open_.any(axis=1).all())
    within, priced = np.where(open_, loss, np.inf), np.stack([cost.table for cost in tables])
    capacities = np.array([bound.limit - cost.constant for bound, cost in zip(bounds, tables, strict=True)])
    found = price(within, priced, capacities)
    slack = 1e-9 * np.abs(loss).sum()
    choice = allocate(found, within, priced, capacities)
    if best is None:
        assert choice is None
        return
    assert found.bound <= best + slack
    assert (found.prices >= 0).all()
    if choice is not None:
        rows = np.arange(len(loss))
        assert (priced[:, rows, choice].sum(axis=1) <= capacities + 1e-12 * np.abs(capacities)).all()
        assert found.bound + found.reduced[rows, choice].sum() <= loss[rows, choice].sum() + slack


def test_three_budgets_on_two_thousand_units_are_solved_to_the_gap_asked_for() -> None:
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
    found = solve(loss, costs, bounds, gap=1e-4)
    assert found.choice is not None
    assert found.status == "optimal"
    assert found.gap <= 1e-4
    near = solve(loss, costs, bounds, prove=False)
    assert found.bound <= near.objective
    assert near.gap <= 1e-3
    assert all(bound.admits(costs[bound.resource].total(found.choice)) for bound in bounds)


@pytest.mark.parametrize("seed", range(12))
def test_without_highs_cbc_finds_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    loss = rng.lognormal(0, 2, (12, 4))
    costs = {name: Cost(name, rng.integers(1, 50, (12, 4)).astype(float), 0.0) for name in NAMES[:3]}
    bounds = [bound_at(cost, 0.4) for cost in costs.values()]
    expected = solve(loss, costs, bounds)
    monkeypatch.setattr(pulp.HiGHS, "available", lambda _self: False)
    found = solve(loss, costs, bounds)
    assert (found.status, found.objective) == (expected.status, pytest.approx(expected.objective, rel=1e-5))
