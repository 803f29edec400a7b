"""Costs are the real ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.allocation import layer_schemes
from search.cost import cost_tables
from tests.search.spaces import decoder, space

MODEL = decoder()
SPACE = space(MODEL)
COSTS = cost_tables(SPACE, MODEL)
choices = st.lists(st.integers(0, 2), min_size=len(SPACE.units), max_size=len(SPACE.units)).map(np.array)


@given(choices)
def test_totals_equal_a_count_layer_by_layer(choice: np.ndarray) -> None:
    schemes = layer_schemes(SPACE, choice)
    searched = sum(layer.weights for layer in SPACE.layers)
    bits = sum(schemes[layer.name].storage_bits(layer.rows, layer.columns) for layer in SPACE.layers)
    bitops = sum(layer.macs * schemes[layer.name].weight_bits * 16 for layer in SPACE.layers)
    head = MODEL.layers[0].macs * 16 * 16
    assert COSTS["avg_bits"].total(choice) == pytest.approx(bits / searched)
    assert COSTS["size_bytes"].total(choice) == pytest.approx(bits / 8 + 2 * (MODEL.parameters - searched))
    assert COSTS["bitops"].total(choice) == pytest.approx(bitops + head)


def test_uniform_bits_are_the_schemes_own() -> None:
    assert COSTS["avg_bits"].smallest == pytest.approx(4.5)
    assert COSTS["avg_bits"].largest == pytest.approx(8.5)


def test_activation_bits_count_in_bit_operations() -> None:
    costs = cost_tables(space(MODEL, schemes=("w8a8", "w8a16")), MODEL)["bitops"]
    assert (costs.table[:, 0] * 2 == costs.table[:, 1]).all()


def test_what_a_unit_may_not_take_costs_infinitely_much() -> None:
    pinned = space(MODEL, pin={"*.o_proj": "w8a16g32"})
    table = cost_tables(pinned, MODEL)["size_bytes"].table
    assert (np.isinf(table) == ~pinned.allowed).all()
