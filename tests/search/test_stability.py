"""Decisions at all prices, and which of them survive the errors of the values."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from search.stability import changed_decisions, decisions

Array = NDArray[np.float64]
BITS = np.array([2.0, 3.0, 4.0, 8.0])


@st.composite
def tables(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """Values that fall with the bits, relative errors, and bits; some schemes are not allowed."""
    units = draw(st.integers(1, 6))
    scale = draw(arrays.arrays(float, (units, 1), elements=st.floats(1e-6, 1e3)))
    falls = draw(arrays.arrays(float, (units, len(BITS)), elements=st.floats(1.01, 30.0)))
    values = scale / falls.cumprod(axis=1)
    allowed: Any = draw(arrays.arrays(bool, values.shape))
    allowed[:, -1] = True
    sizes = draw(arrays.arrays(float, (units, 1), elements=st.sampled_from([1.0, 10.0, 1000.0])))
    errors = draw(arrays.arrays(float, units, elements=st.floats(0, 2)))
    return np.where(allowed, values, np.inf), errors, sizes * BITS


@given(tables())
def test_without_error_no_decision_changes(table: tuple[Array, Array, Array]) -> None:
    values, errors, bits = table
    assert changed_decisions(values, 0 * errors, bits) == 0.0


@given(tables())
def test_it_is_a_fraction_and_grows_with_the_error(table: tuple[Array, Array, Array]) -> None:
    values, errors, bits = table
    fractions = [changed_decisions(values, factor * errors, bits) for factor in (0.25, 0.5, 1.0)]
    assert 0 <= fractions[0] <= fractions[1] <= fractions[2] <= 1


@given(tables(), st.integers(-40, 40), st.integers(-10, 10))
def test_units_of_measurement_do_not_matter(
    table: tuple[Array, Array, Array], value_scale: int, bit_scale: int
) -> None:
    values, errors, bits = table
    scaled = changed_decisions(values * 2.0**value_scale, errors, bits * 2.0**bit_scale)
    # What stands exactly at a price may fall either way.
    assert abs(scaled - changed_decisions(values, errors, bits)) <= 2 / 64


@given(tables())
def test_units_without_a_choice_do_not_count(table: tuple[Array, Array, Array]) -> None:
    values, errors, bits = table
    settled = np.full((3, values.shape[1]), np.inf)
    settled[:, 0] = 1.0
    more = changed_decisions(
        np.vstack([values, settled]), np.append(errors, np.ones(3)), np.vstack([bits, bits[[0] * 3]])
    )
    assert more == changed_decisions(values, errors, bits)


def test_a_decision_is_the_scheme_of_least_value_plus_price() -> None:
    values = np.array([[9.0, 3.0, 1.0], [np.inf, 3.0, 1.0]])
    bits = np.array([[2.0, 3.0, 4.0]] * 2)
    found = decisions(values, bits, np.array([1.0, 3.0, 7.0]))
    assert found.tolist() == [[2, 2], [1, 1], [0, 1]]


def test_two_units_with_one_threshold_each_change_by_the_logarithm_of_their_error() -> None:
    """Two schemes: a unit changes at prices between its threshold and the moved one."""
    generator = np.random.default_rng(0)
    gains = np.exp(generator.uniform(0, np.log(1e4), 4000))
    values = np.stack([gains, np.zeros(4000)], axis=1)
    bits = np.tile([0.0, 1.0], (4000, 1))
    errors = np.full(4000, 0.1)
    moved = (np.log(1.2) - np.log(0.8)) / 2 / np.log(1e4)
    assert abs(changed_decisions(values, errors, bits) - moved) < 0.3 * moved
