"""Shadow prices against finite differences of the linear program."""

import numpy as np
import pulp
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.cost import Cost
from search.errors import InfeasibleBudget
from search.knapsack import relax
from search.prices import loss_saved, shadow_prices, share_prices

Table = NDArray[np.float64]
Limits = dict[str, float]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, dict[str, Cost], Limits]:
    """Up to 6 units × 4 schemes and three limits, which are an allocation's own totals or lie anywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    names = ("size_bytes", "bitops", "latency_us")[: draw(st.integers(1, 3))]
    costs = {name: Cost(name, rng.integers(1, 50, shape).astype(float), 7.0) for name in names}
    own, reach = rng.integers(0, shape[1], shape[0]), draw(st.floats(0.1, 1.1))
    at_own = draw(st.booleans())
    limits = {
        name: cost.total(own) if at_own else cost.smallest + reach * (cost.largest - cost.smallest)
        for name, cost in costs.items()
    }
    return rng.lognormal(0, 2, shape), costs, limits


def linear_program(loss: Table, costs: dict[str, Cost], limits: Limits) -> float | None:
    """The oracle: the least loss of fractions of schemes."""
    program = pulp.LpProblem("relaxation", pulp.LpMinimize)
    x = {at: program.add_variable(f"x_{at[0]}_{at[1]}", 0, 1) for at in np.ndindex(loss.shape)}
    program += pulp.lpSum(float(loss[at]) * one for at, one in x.items())
    for unit in range(len(loss)):
        program += pulp.lpSum(one for (u, _), one in x.items() if u == unit) == 1
    for name, limit in limits.items():
        program += (
            pulp.lpSum(float(costs[name].table[at]) * one for at, one in x.items()) <= limit - costs[name].constant
        )
    program.solve(pulp.HiGHS(msg=False))
    return float(pulp.value(program.objective)) if program.sol_status == pulp.LpSolutionOptimal else None


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(-5, 5))
def test_prices_are_slopes_of_the_linear_programs_least_loss(
    problem: tuple[Table, dict[str, Cost], Limits], more: float
) -> None:
    """It is convex: no step along one limit saves more than the price times the step."""
    loss, costs, limits = problem
    here = linear_program(loss, costs, limits)
    assume(here is not None)
    assert here is not None
    prices = shadow_prices(loss, costs, limits)
    assert all(price >= 0 for price in prices.values())
    for name, price in prices.items():
        there = linear_program(loss, costs, limits | {name: limits[name] + more})
        if there is not None:
            assert here - there <= price * more + 1e-5 * here


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0, 30))
def test_the_loss_saved_is_the_linear_programs(problem: tuple[Table, dict[str, Cost], Limits], more: float) -> None:
    loss, costs, limits = problem
    here = linear_program(loss, costs, limits)
    there = linear_program(loss, costs, limits | {"size_bytes": limits["size_bytes"] + more})
    if here is None or there is None:
        return
    assert loss_saved(loss, costs, limits, {"size_bytes": more}) == pytest.approx((here - there) / here, abs=1e-5)


def test_the_price_of_one_budget_is_the_slope_of_the_next_step() -> None:
    """From one scheme to the next 4 bytes save 8, then 4 save 2."""
    costs = {"size_bytes": Cost("size_bytes", np.array([[4.0, 8.0, 12.0]]), 0.0)}
    loss = np.array([[10.0, 2.0, 0.0]])
    assert [shadow_prices(loss, costs, {"size_bytes": at})["size_bytes"] for at in (4, 6, 8, 9, 12, 99)] == [
        2.0, 2.0, 0.5, 0.5, 0.0, 0.0,
    ]  # fmt: skip
    assert loss_saved(loss, costs, {"size_bytes": 4}, {"size_bytes": 4}) == pytest.approx(0.8)
    assert loss_saved(loss, costs, {"size_bytes": 12}, {"size_bytes": 4}) == 0.0


def test_shares_are_of_the_loss_and_those_of_proportional_resources_agree() -> None:
    """The loss is the sum to a power: a sum that falls by 1 % lets its 1.5th power fall by 1.5 %."""
    rng = np.random.default_rng(0)
    table = rng.uniform(1, 9, (20, 4))
    size, bits = Cost("size_bytes", 8 * table, 5.0), Cost("avg_bits", table, 0.0)
    loss = 1 / table
    alone = shadow_prices(loss, {"avg_bits": bits}, {"avg_bits": 60.0})["avg_bits"]
    least = relax(loss, table).bound(60.0)
    limits = {"avg_bits": 60.0, "size_bytes": 8 * 60.0 + 5.0}
    shares = share_prices(loss, {"avg_bits": bits, "size_bytes": size}, limits, 1.5)
    assert shares == pytest.approx({"avg_bits": 1.5 * alone / least, "size_bytes": 1.5 * alone / least / 8})


def test_a_budget_that_does_not_bind_has_no_price() -> None:
    rng = np.random.default_rng(0)
    costs = {name: Cost(name, rng.uniform(1, 9, (20, 4)), 0.0) for name in ("size_bytes", "bitops")}
    loss = 1 / costs["size_bytes"].table
    prices = shadow_prices(loss, costs, {"size_bytes": 60.0, "bitops": 1e6})
    assert prices["bitops"] == 0
    assert prices["size_bytes"] > 0


def test_limits_that_nothing_keeps_have_no_prices() -> None:
    costs = {
        "size_bytes": Cost("size_bytes", np.array([[1.0, 3.0]]), 0.0),
        "bitops": Cost("bitops", np.array([[3.0, 1.0]]), 0.0),
    }
    for limits in ({"size_bytes": 0.5}, {"size_bytes": 0.5, "bitops": 9.0}, {"size_bytes": 1.5, "bitops": 1.5}):
        with pytest.raises(InfeasibleBudget, match="no allocation keeps these limits"):
            shadow_prices(np.ones((1, 2)), costs, limits)
