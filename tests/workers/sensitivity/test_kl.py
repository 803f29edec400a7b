"""Measured divergence: reuse of the blocks before a unit changes nothing."""

import pytest

from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator


def test_kl_with_reuse_is_the_plain_measurement_of_one_unit(minilm: Evaluator) -> None:
    space = space_of(minilm, "w2a16g64", "w4a16g64", target="vllm")
    table = fill("kl", minilm, space)
    for row in (0, 9, len(space.units) - 1):
        layers = [layer.name for layer in space.units[row].layers]
        for column, scheme in enumerate(space.schemes):
            plain = minilm.measure(dict.fromkeys(layers, scheme), split="calibration")
            assert table.values.iloc[row, column] == pytest.approx(plain["loss"], rel=1e-4, abs=1e-7)
            assert table.stderr.iloc[row, column] == pytest.approx(plain["loss_stderr"], rel=1e-3, abs=1e-7)
