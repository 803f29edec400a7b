"""What stands out above the others, on a log scale."""

import numpy as np
import pytest

from search.outliers import stand_out, times_median

ORDINARY = np.exp(np.linspace(-1, 1, 21))


def test_what_is_far_above_the_median_stands_out() -> None:
    # The median absolute deviation of the logarithms is 0.5, and 3.5 spreads are then a factor of exp(2.59) = 13.4.
    assert stand_out(np.append(ORDINARY, 20.0)).tolist() == [False] * 21 + [True]
    assert not stand_out(np.append(ORDINARY, 9.0)).any()
    assert not stand_out(np.append(ORDINARY, 1e-6)).any(), "what is far below does no harm"


def test_size_counts_and_neither_sign_nor_unit() -> None:
    values = np.append(ORDINARY, -20.0)
    assert stand_out(values)[-1]
    assert (stand_out(values) == stand_out(values * 1e-9)).all()


def test_zeros_and_unknowns_say_nothing() -> None:
    values = np.concatenate([ORDINARY, [20.0, 0.0, np.nan], np.zeros(40)])
    assert np.flatnonzero(stand_out(values)).tolist() == [21]
    assert times_median(values)[21] == pytest.approx(20 / np.median(np.append(ORDINARY, 20.0)))


def test_few_or_equal_values_have_no_outliers() -> None:
    assert not stand_out(np.array([1.0, 1.1, 1.2, 1e9])).any()
    assert not stand_out(np.append(np.ones(20), 1e9)).any()
    assert not stand_out(np.zeros(20)).any()
