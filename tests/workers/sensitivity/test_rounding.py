"""Rounding errors, relative to the weights."""

import numpy as np
import pytest

from search.scheme import Scheme
from tests.workers.sensitivity.support import compute_on, space_of
from workers.evaluator import Evaluator
from workers.sensitivity.rounding import relative_errors


def test_relative_errors_are_of_all_the_weights_of_a_unit(minilm: Evaluator) -> None:
    space = space_of(minilm, "w2a16g64", "w4a16g64", "w4a8g64", granularity="block", ignore=["*embed*"])
    errors = relative_errors(compute_on(minilm), space)
    unit = next(row for row, unit in enumerate(space.units) if len(unit.layers) > 3)
    for column, scheme in enumerate(space.schemes):
        rounding = [minilm.rounding(layer.name, scheme).double() for layer in space.units[unit].layers]
        weights = [minilm.weight(layer.name, Scheme(16)).double() for layer in space.units[unit].layers]
        square = sum(float(weight.square().sum()) for weight in weights)
        assert errors[unit, column] == pytest.approx(sum(float(one.square().sum()) for one in rounding) / square)
    assert (errors > 0).all()
    assert (errors < 1).all()


def test_what_is_not_rounded_has_no_relative_error(minilm: Evaluator) -> None:
    space = space_of(minilm, "w4a16", pin={"*.layer.0.*": "w16a16"})
    errors = relative_errors(compute_on(minilm), space)
    rounds = [scheme.quantizes_weights for scheme in space.schemes]
    assert np.isfinite(errors).all(axis=0).tolist() == rounds
