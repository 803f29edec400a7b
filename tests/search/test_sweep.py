"""Levels of a resource, and the best allocations within all budgets at each."""

import numpy as np
import pytest

from search.budget import Bound
from search.cost import cost_tables
from search.proposals import baselines
from search.sweep import Sweep
from tests.search.spaces import decoder, space

MODEL = decoder()
SPACE = space(MODEL)
COSTS = cost_tables(SPACE, MODEL)
LOSS = np.random.default_rng(0).lognormal(0, 1, (len(SPACE.units), 1)) * np.array([1.0, 0.1, 0.01])


def test_levels_go_from_the_budget_down_and_meet_the_uniform_configurations() -> None:
    sweep = Sweep.of(COSTS, [Bound("avg_bits", "avg_bits", 7.0)], "avg_bits", 5, list(baselines(SPACE).values()))
    assert sweep.limit == 7.0
    assert (np.diff(sweep.levels) < 0).all()
    assert {4.5, 6.5, 7.0} <= set(sweep.levels.tolist())
    assert 8.5 not in sweep.levels


@pytest.mark.parametrize("prove", [False, True])
def test_the_frontier_keeps_every_budget_at_every_level(prove: bool) -> None:
    middle = (COSTS["bitops"].smallest + COSTS["bitops"].largest) / 2
    bounds = [Bound("avg_bits", "avg_bits", 7.0), Bound("gbitops", "bitops", middle)]
    sweep = Sweep.of(COSTS, bounds, "avg_bits", 8)
    found = sweep.frontier(LOSS, prove=prove)
    assert len(found) > 3
    assert all(map(sweep.admits, found))
    losses = [float(LOSS[np.arange(len(LOSS)), choice].sum()) for choice in found]
    assert losses == sorted(losses)
    assert (np.diff(sweep.totals(found)) < 0).all()


def test_some_levels_only() -> None:
    sweep = Sweep.of(COSTS, [Bound("avg_bits", "avg_bits", 7.0)], "avg_bits", 8)
    (cheapest,) = sweep.frontier(LOSS, sweep.levels[-1:])
    assert not cheapest.any()


def test_a_budget_that_everything_keeps_changes_nothing() -> None:
    bound = Bound("avg_bits", "avg_bits", 7.0)
    loose = Bound("gbitops", "bitops", COSTS["bitops"].largest * 2)
    assert Sweep.of(COSTS, [bound, loose], "avg_bits", 8).bounds == [bound]
