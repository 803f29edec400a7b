"""The control: bytes saved."""

from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator


def test_size_is_the_bytes_that_a_scheme_saves(tiny: Evaluator) -> None:
    table = fill("size", tiny, space_of(tiny, "w4a16", "w8a8", "w16a16"))
    # 5 × 4 weights of 16 bits are 40 bytes; of 4 bits with a 16-bit scale a row, 10 + 10.
    assert table.values.loc["head", "w4a16"] == 20
    # 4 filters of 9 weights: 72 bytes against 36 + 8.
    assert table.values.loc["conv", "w8a8"] == 28
    assert (table.values["w16a16"] == 0).all()
    assert (table.activation.to_numpy() == 0).all()
