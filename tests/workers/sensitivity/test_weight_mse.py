"""The squared rounding error of the weights."""

import pytest

from search.scheme import Scheme
from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator


def test_weight_mse_is_the_squared_distance_of_the_weights_that_are_applied(tiny: Evaluator) -> None:
    space = space_of(tiny, "w3a16", "w4a16")
    table = fill("weight_mse", tiny, space)
    for unit in space.units:
        parameter = tiny.layers[unit.name].parameter
        original = parameter.detach().clone()
        for scheme in space.schemes:
            tiny.apply({unit.name: scheme})
            expected = float((parameter - original).square().sum())
            assert table.values.loc[unit.name, str(scheme)] == pytest.approx(expected, rel=1e-5)
    tiny.apply({})


def test_rounded_activations_are_not_seen_and_that_is_said(tiny: Evaluator) -> None:
    table = fill("weight_mse", tiny, space_of(tiny, "w4a8", "w4a16"))
    assert table.values["w4a8"].equals(table.values["w4a16"].rename("w4a8"))
    assert "activations are not seen" in table.notes[0]
    assert fill("weight_mse", tiny, space_of(tiny, "w4a16")).notes == ()


def test_a_unit_counts_all_its_layers(minilm: Evaluator) -> None:
    space = space_of(minilm, "w4a16g64", target="vllm")
    unit = next(unit for unit in space.units if len(unit.layers) == 3)
    total = sum(minilm.rounding_error(layer.name, Scheme.parse("w4a16g64")) for layer in unit.layers)
    assert fill("weight_mse", minilm, space).values.loc[unit.name, "w4a16g64"] == pytest.approx(total)
