"""Packed weights are laid out as the kernels read them, take exactly b bits a code, and come back as they were."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from search.scheme import Scheme
from workers.kernels.errors import KernelError
from workers.kernels.pack import GROUP_SIZES, WEIGHT_BITS, Packed, pack, unpack

every_width = pytest.mark.parametrize("bits", WEIGHT_BITS)
patient = settings(deadline=None, max_examples=60)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor, Scheme]:
    """Codes, scales and scheme: any rows, any columns a group divides."""
    bits, group = draw(st.sampled_from(WEIGHT_BITS)), draw(st.sampled_from(GROUP_SIZES))
    rows, columns = draw(st.integers(1, 140)), (group or 32) * draw(st.integers(1, 9))
    return *random_weight(rows, columns, Scheme(bits, 8, group), draw(st.integers(0, 2**31))), Scheme(bits, 8, group)


def random_weight(rows: int, columns: int, scheme: Scheme, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (scheme.weight_bits - 1)
    codes = torch.randint(-most, most, (rows, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(rows, columns // (scheme.group_size or columns), generator=generator)
    return codes, scales.to(torch.float16).float()


def laid_out(codes: Tensor, bits: int) -> bytes:
    """The oracle: whole tiles one after the other, each plane by plane."""
    rows, columns = codes.shape
    unsigned = codes.numpy().astype(np.int64) & (2**bits - 1)
    tiles = itertools.product(range(0, rows, 16), range(0, columns, 128))
    return b"".join(tile_bytes(unsigned[row : row + 16, column : column + 128], bits) for row, column in tiles)


def tile_bytes(tile: NDArray[np.int64], bits: int) -> bytes:
    nibbles, crumbs = np.zeros((8, 32), np.uint32), np.zeros((4, 32), np.uint32)
    single, whole = np.zeros((2, 32), np.uint32), np.zeros((16, 32), np.uint32)
    for g, t, c, h, p, j in itertools.product(range(8), range(4), range(4), range(2), range(2), range(4)):
        lane, code = 4 * g + t, int(tile[g + 8 * p, 32 * c + 8 * t + 4 * h + j])
        nibble = {4: code, 5: code >> 1, 6: code >> 2}.get(bits, 0)
        crumb = {3: code >> 1, 6: code & 3}.get(bits, 0)
        nibbles[2 * c + p, lane] |= nibble << (8 * j + (4 if h == 0 else 0))
        crumbs[c, lane] |= crumb << (8 * j + 2 * (p + 2 * h))
        single[c // 2, lane] |= (code & 1) << (8 * j + 4 * (c & 1) + p + 2 * h)
        whole[4 * c + p + 2 * h, lane] |= code << (8 * j)
    stored = {
        "nibbles": nibbles.reshape(2, 4, 32).transpose(0, 2, 1),
        "crumbs": crumbs.T,
        "bits": single.T,
        "bytes": whole.reshape(4, 4, 32).transpose(0, 2, 1),
    }
    planes = {3: ["crumbs", "bits"], 4: ["nibbles"], 5: ["nibbles", "bits"], 6: ["nibbles", "crumbs"], 8: ["bytes"]}
    return b"".join(stored[plane].astype("<u4").tobytes() for plane in planes[bits])


@patient
@given(weights())
def test_what_is_packed_comes_back(weight: tuple[Tensor, Tensor, Scheme]) -> None:
    codes, scales, scheme = weight
    found_codes, found_scales = unpack(pack(codes, scales, scheme))
    assert torch.equal(found_codes, codes)
    assert found_scales.dtype == torch.float16
    assert torch.equal(found_scales.float(), scales)


@every_width
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (128, 384), (37, 160), (1, 32)])
def test_bytes_lie_where_the_fragments_of_an_mma_want_them(bits: int, rows: int, columns: int) -> None:
    scheme = Scheme(bits, 8)
    codes, scales = random_weight(rows, columns, scheme)
    padded = torch.zeros(-(-rows // 64) * 64, -(-columns // 128) * 128, dtype=torch.int8)
    padded[:rows, :columns] = codes
    assert pack(codes, scales, scheme).tiles.numpy().tobytes() == laid_out(padded, bits)


@patient
@given(weights())
def test_a_weight_takes_exactly_its_bits(weight: tuple[Tensor, Tensor, Scheme]) -> None:
    codes, scales, scheme = weight
    packed = pack(codes, scales, scheme)
    rows, columns = -(-len(codes) // 64) * 64, -(-codes.shape[1] // 128) * 128
    assert (packed.rows_padded, packed.columns_padded) == (rows, columns)
    assert packed.tiles.shape == (rows * columns * scheme.weight_bits // 8,)
    groups = columns // scheme.group_size if scheme.group_size else 1
    assert packed.scales.shape == (groups, rows)


@patient
@given(weights(), st.data())
def test_a_flipped_bit_changes_one_code(weight: tuple[Tensor, Tensor, Scheme], data: st.DataObject) -> None:
    codes, scales, scheme = weight
    rows, columns = -(-len(codes) // 64) * 64, -(-codes.shape[1] // 128) * 128
    whole, scales = random_weight(rows, columns, scheme)
    packed = pack(whole, scales, scheme)
    byte = data.draw(st.integers(0, packed.tiles.numel() - 1))
    packed.tiles[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert int((unpack(packed)[0] != whole).sum()) == 1


@patient
@given(weights())
def test_padding_is_zero(weight: tuple[Tensor, Tensor, Scheme]) -> None:
    codes, scales, scheme = weight
    packed = pack(codes, scales, scheme)
    whole = Packed(scheme, packed.rows_padded, packed.columns_padded, packed.tiles, packed.scales)
    padded_codes, padded_scales = unpack(whole)
    padded_codes[: len(codes), : codes.shape[1]] = 0
    padded_scales[: len(codes), : scales.shape[1]] = 0
    assert not padded_codes.any()
    assert not padded_scales.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_of_any_type_are_stored_as_float16(dtype: torch.dtype) -> None:
    codes = torch.ones(3, 64, dtype=torch.int8)
    scales = torch.tensor([[0.5], [2.0**-24], [0.0]], dtype=dtype)
    assert unpack(pack(codes, scales, Scheme(4)))[1].to(dtype).equal(scales)


def test_a_weight_moves_between_devices() -> None:
    packed = pack(*random_weight(5, 64, Scheme(5)), Scheme(5))
    assert packed.to("meta").device == torch.device("meta")
    assert packed.to("cpu").tiles.equal(packed.tiles)


ONES = torch.ones(2, 64, dtype=torch.int8)
HALVES = torch.full((2, 1), 0.5)


@pytest.mark.parametrize("text", ["w2a16", "w7a16", "w4a16g16", "w4a8g256", "w4a16asym", "w16a16"])
def test_a_scheme_without_kernels_is_refused(text: str) -> None:
    with pytest.raises(KernelError, match=text) as caught:
        pack(ONES, HALVES, Scheme.parse(text))
    assert caught.value.field == "scheme"
    assert caught.value.value == text
    assert "w3, w4, w5, w6 or w8" in caught.value.accepted


@pytest.mark.parametrize(
    ("codes", "scales", "text", "field", "accepted"),
    [
        (ONES * 4, HALVES, "w3a16", "codes", "-4 … 3 in 3 bits"),
        (ONES * -17, HALVES, "w5a16", "codes", "-16 … 15"),
        (ONES.int(), HALVES, "w4a16", "codes", "torch.int8"),
        (ONES[0], HALVES, "w4a16", "codes", "rows × columns"),
        (ONES.T.contiguous().T, HALVES, "w4a16", "codes", "contiguous"),
        (ONES[:0], HALVES[:0], "w4a16", "rows", "at least 1"),
        (ONES[:, :48].contiguous(), HALVES, "w4a16", "columns", "a multiple of 32"),
        (ONES[:, :32].contiguous(), HALVES, "w4a16g64", "columns", "a multiple of 64"),
        (torch.ones(1, 130_976, dtype=torch.int8), HALVES[:1], "w4a16", "columns", "up to 130944"),
        (ONES, HALVES, "w4a16g32", "scales", r"\(2, 2\)"),
        (ONES, HALVES.int(), "w4a16", "scales", "torch.float16"),
        (ONES, HALVES.to("meta"), "w4a16", "scales", "cpu"),
        (ONES, -HALVES, "w4a16", "scales", "from 0 to 65504"),
        (ONES, HALVES * torch.nan, "w4a16", "scales", "from 0 to 65504"),
        (ONES, HALVES * torch.inf, "w4a16", "scales", "from 0 to 65504"),
        (ONES, HALVES * 2e5, "w4a16", "scales", "from 0 to 65504"),
        (ONES, HALVES * 2.0**-24, "w4a16", "scales", "float16 represents exactly"),
        (ONES, HALVES + 2.0**-12, "w4a16", "scales", "float16 represents exactly"),
    ],
)
def test_what_cannot_be_packed_is_refused(codes: Tensor, scales: Tensor, text: str, field: str, accepted: str) -> None:
    with pytest.raises(KernelError, match=accepted) as caught:
        pack(codes, scales, Scheme.parse(text))
    assert caught.value.field == field
    assert caught.value.value is not None


def test_tiles_that_a_kernel_would_overrun_are_refused() -> None:
    packed = pack(ONES, HALVES, Scheme(4))
    with pytest.raises(KernelError, match="tiles"):
        Packed(packed.scheme, 65, packed.columns, packed.tiles, packed.scales)
    with pytest.raises(KernelError, match="scales"):
        Packed(packed.scheme, packed.rows, packed.columns, packed.tiles, packed.scales.float())
    with pytest.raises(KernelError, match="scales"):
        Packed(packed.scheme, packed.rows, packed.columns, packed.tiles, packed.scales.to("meta"))
