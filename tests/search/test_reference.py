"""Water-filling against its optimality conditions and brute force; bounds against every allocation."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.budget import Bound
from search.cost import cost_tables
from search.reference import ideal_losses, loss_per_error, lower_bounds, reference, water_filling
from search.surrogate import Features, Surrogate
from search.sweep import Sweep
from tests.search.spaces import decoder, space

Floats = NDArray[np.float64]

MODEL = decoder()
SPACE = space(MODEL, "generic", schemes=("w2a16g32", "w4a16g32", "w6a16g32", "w8a16g32"))
COSTS = cost_tables(SPACE, MODEL)
WEIGHTS = np.array([unit.weights for unit in SPACE.units], dtype=float)
BITS = np.array([scheme.weight_bits for scheme in SPACE.schemes], dtype=float)
PINNED = "model.layers.0.mlp.down_proj"
SENSITIVITIES = np.random.default_rng(0).lognormal(0, 2, len(SPACE.units))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Floats, Floats, float]:
    """Up to 4 units that differ by orders of magnitude, and up to 8 bits per weight."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 4))
    weights = rng.integers(1, 1000, count).astype(float)
    return rng.lognormal(0, 3, count), weights, draw(st.floats(0, 8)) * weights.sum()


def ideal_loss(sensitivities: Floats, bits: Floats) -> float:
    return float((sensitivities * 2 ** (-2 * bits)).sum())


@given(problems())
def test_water_filling_meets_the_optimality_conditions(problem: tuple[Floats, Floats, float]) -> None:
    """Every bit is spent; where a unit has some, one more would save the same everywhere, elsewhere no more."""
    sensitivities, weights, capacity = problem
    bits = water_filling(sensitivities, weights, capacity)
    assert (bits >= 0).all()
    assert weights @ bits == pytest.approx(capacity, rel=1e-9, abs=1e-9)
    slopes = 2 * np.log(2) * sensitivities * 2 ** (-2 * bits) / weights
    if (bits > 0).any():
        price = slopes[bits > 0].max()
        assert slopes[bits > 0] == pytest.approx(price, rel=1e-6)
        assert (slopes <= price * (1 + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(problems())
def test_no_grid_of_fractional_bits_betters_water_filling(problem: tuple[Floats, Floats, float]) -> None:
    sensitivities, weights, capacity = problem
    sensitivities, weights = sensitivities[:3], weights[:3]
    least = ideal_loss(sensitivities, water_filling(sensitivities, weights, capacity))
    grid = np.array(list(product(np.arange(0, 10.1, 0.5), repeat=len(weights))))
    within = grid[grid @ weights <= capacity]
    losses = (sensitivities * 2 ** (-2 * within)).sum(axis=1)
    assert least <= losses.min() * (1 + 1e-9)


def test_water_filling_is_near_the_best_point_of_a_fine_grid() -> None:
    sensitivities, weights, capacity = np.array([8.0, 1.0]), np.array([1.0, 3.0]), 8.0
    first = np.linspace(0, capacity, 100_001)
    losses = 8.0 * 2 ** (-2 * first) + 2 ** (-2 * (capacity - first) / 3)
    bits = water_filling(sensitivities, weights, capacity)
    assert bits[0] == pytest.approx(first[losses.argmin()], abs=1e-4)
    assert ideal_loss(sensitivities, bits) == pytest.approx(losses.min(), rel=1e-8)


def test_nothing_to_spend_buys_nothing() -> None:
    assert water_filling(np.array([3.0, 1.0]), np.array([1.0, 2.0]), 0.0).tolist() == [0, 0]
    assert water_filling(np.array([3.0, 1.0]), np.array([1.0, 2.0]), -5.0).tolist() == [0, 0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=len(SPACE.units), max_size=len(SPACE.units)))
def test_no_allocation_of_an_ideal_quantizer_is_below_the_rate_distortion_limit(schemes: list[int]) -> None:
    choice = np.array(schemes)
    errors = np.tile(2 ** (-2 * BITS), (len(SPACE.units), 1))
    loss = SENSITIVITIES[:, None] * errors
    assert loss_per_error(loss, errors) == pytest.approx(SENSITIVITIES)
    sweep = Sweep.of(COSTS, [Bound("avg_bits", "avg_bits", 8.5)], "avg_bits", 3)
    level = float(WEIGHTS @ BITS[choice] / WEIGHTS.sum())
    least = ideal_losses(loss, errors, sweep, SPACE, np.array([level]))
    assert least is not None
    assert least[0] <= ideal_loss(SENSITIVITIES, BITS[choice]) * (1 + 1e-9)


def test_size_and_average_bits_are_one_limit_and_bit_operations_none() -> None:
    errors = np.tile(2 ** (-2 * BITS), (len(SPACE.units), 1))
    loss = SENSITIVITIES[:, None] * errors
    found = {}
    for axis in COSTS:
        sweep = Sweep.of(COSTS, [], axis, 5)
        found[axis] = ideal_losses(loss, errors, sweep, SPACE, sweep.levels)
    assert found["avg_bits"] == pytest.approx(found["size_bytes"])
    assert found["bitops"] is None


def test_the_loss_per_error_is_not_moved_by_one_scheme_that_is_far_off() -> None:
    errors = np.array([[0.1, 0.01, 0.001, np.nan]])
    assert loss_per_error(np.array([[0.2, 0.02, 0.5, 0.0]]), errors) == pytest.approx([2.0])
    assert loss_per_error(np.zeros((1, 4)), errors).tolist() == [0.0], "a unit that loses nothing"


def test_a_unit_that_stays_at_full_precision_keeps_its_bits() -> None:
    pinned = space(MODEL, "generic", schemes=("w4a16g32", "w8a16g32"), pin={PINNED: "w16a16"})
    costs = cost_tables(pinned, MODEL)
    errors = np.where(pinned.allowed, [[4.0**-4, 4.0**-8, np.nan]], np.nan)
    loss = np.where(np.isfinite(errors), errors, 0.0)
    sweep = Sweep.of(costs, [], "avg_bits", 2)
    rest = np.array([unit.weights for unit in pinned.units if unit.name != PINNED], dtype=float)
    found = ideal_losses(loss, errors, sweep, pinned, sweep.levels)
    assert found is not None
    spent = sweep.levels * sum(unit.weights for unit in pinned.units) - 16 * 64 * 128
    expected = [ideal_loss(np.ones(len(rest)), water_filling(np.ones(len(rest)), rest, bits)) for bits in spent]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("several", [False, True])
def test_no_candidate_within_a_level_is_predicted_below_its_lower_bound(several: bool) -> None:
    rng = np.random.default_rng(1)
    proxy = SENSITIVITIES[:, None] * 4.0**-BITS * rng.lognormal(0, 0.3, (len(SPACE.units), len(BITS)))
    known = rng.integers(0, len(BITS), (20, len(SPACE.units)))
    losses = (proxy * rng.lognormal(0, 0.3, proxy.shape))[np.arange(len(proxy)), known].sum(axis=1) ** 1.3
    surrogate = Surrogate.fit(Features.of(SPACE, {"proxy": proxy}), known, losses)
    middle = (COSTS["bitops"].smallest + COSTS["bitops"].largest) / 2
    bounds = [Bound("avg_bits", "avg_bits", 8.0)] + ([Bound("gbitops", "bitops", middle)] if several else [])
    sweep = Sweep.of(COSTS, bounds, "avg_bits", 6)
    told = reference(surrogate, sweep, SPACE, np.tile(4.0**-BITS, (len(SPACE.units), 1)))
    assert told.levels == sweep.levels.tolist()
    assert told.rate_distortion is not None
    assert told.lower_bound == sorted(told.lower_bound)
    near = sweep.frontier(surrogate.table, prove=True)
    candidates = np.array([*near, *rng.integers(0, len(BITS), (300, len(SPACE.units)))])
    candidates = candidates[[sweep.admits(choice) for choice in candidates]]
    predicted, totals = np.exp(surrogate.predict(candidates)[0]), sweep.totals(candidates)
    for level, bound in zip(told.levels, told.lower_bound, strict=True):
        within = predicted[totals <= level]
        assert (within >= bound * (1 - 1e-9)).all()
        assert within.min() <= 2 * bound, "a bound that nothing comes near says little"


def test_the_lower_bound_of_a_space_without_a_choice_is_its_loss() -> None:
    only = space(MODEL, "generic", schemes=("w4a16g32",))
    loss = SENSITIVITIES[:, None]
    bounds = lower_bounds(loss, Sweep.of(cost_tables(only, MODEL), [], "size_bytes", 1))
    assert bounds == pytest.approx([loss.sum()])


def test_rounded_activations_have_no_rate_distortion_limit() -> None:
    surrogate = Surrogate.fit(
        Features.of(SPACE, {"proxy": SENSITIVITIES[:, None] * 4.0**-BITS}),
        np.zeros((0, len(SPACE.units)), dtype=np.int64),
        np.zeros(0),
    )
    assert reference(surrogate, Sweep.of(COSTS, [], "avg_bits", 3), SPACE, None).rate_distortion is None
