"""Codes are packed as compressed-tensors packs them, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from search.scheme import Scheme
from workers.checkpoint.compressed import DamagedCheckpoint, compress, decompress, layout
from workers.checkpoint.packing import pack, unpack
from workers.quantizers import Grid, choose_grid, round_to_grid

widths = pytest.mark.parametrize("bits", range(2, 9))


def codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1)
    return torch.randint(-most, most, (rows, columns), dtype=torch.int8, generator=generator)


@widths
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_it_is_their_packing_at_every_width_and_shape(bits: int, rows: int, columns: int, seed: int) -> None:
    given = codes(rows, columns, bits, seed)
    packed = pack(given.numpy(), bits)
    assert np.array_equal(packed, pack_to_int32(given, bits).numpy())
    assert np.array_equal(unpack(packed, bits, columns), given.numpy())


def test_six_bits_leave_no_bit_unused() -> None:
    # 0.17 took 26 words.
    assert pack(codes(1, 128, 6).numpy(), 6).shape == (1, 24)


@pytest.mark.parametrize("text", ["w2a16g32asym", "w3a16g16", "w5a16asym", "w6a16g64", "w7a16asym", "w8a16"])
@pytest.mark.parametrize("quantizer", ["rtn", "mse"])
def test_a_weight_comes_back_as_it_was_rounded(text: str, quantizer: str) -> None:
    scheme = Scheme.parse(text)
    matrix = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    grid = choose_grid(matrix, scheme, quantizer)
    stored = compress(matrix, scheme, grid, "pack-quantized")
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    assert shapes == layout(40, 64, scheme, "pack-quantized")
    assert torch.equal(decompress(stored, scheme), round_to_grid(matrix, grid, scheme))


def test_a_scale_that_16_bits_cannot_hold_is_noticed() -> None:
    scheme = Scheme.parse("w4a16")
    with pytest.raises(DamagedCheckpoint, match="16-bit scales"):
        compress(torch.ones(8, 8), scheme, Grid(torch.full((8, 1, 1), 1 / 3)), "pack-quantized")
