"""Corrected predictions agree with the uniform measurements, and keep how layers compare."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from search.surrogate import scheme_factors

tables = arrays(np.float64, (5, 3), elements=st.floats(1e-6, 1e3))
losses = st.lists(st.floats(1e-9, 1e3), min_size=3, max_size=3)


def uniform(*columns: int) -> list[np.ndarray]:
    return [np.full(5, column) for column in columns]


@given(tables, losses)
def test_every_uniform_prediction_becomes_its_measurement(table: np.ndarray, measured: list[float]) -> None:
    factors = scheme_factors(table, list(zip(range(3), uniform(0, 1, 2), measured, strict=True)))
    assert np.allclose((table * factors).sum(axis=0), measured)


def test_a_scheme_that_was_not_measured_keeps_its_prediction() -> None:
    assert scheme_factors(np.ones((5, 3)), [(1, uniform(1)[0], 10.0)]).tolist() == [1.0, 2.0, 1.0]


def test_nothing_predicted_or_nothing_lost_corrects_nothing() -> None:
    table = np.ones((5, 3))
    table[:, 0] = 0.0
    assert scheme_factors(table, [(0, uniform(0)[0], 1.0), (1, uniform(1)[0], 0.0)]).tolist() == [1.0, 1.0, 1.0]
