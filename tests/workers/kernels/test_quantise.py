"""The kernels that round activations and that write packed weights out, on the emulator: equal to the reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.scheme import Scheme
from workers.kernels import catalogue
from workers.kernels.emulator.build import Emulated
from workers.kernels.pack import GROUP_SIZES, WEIGHT_BITS, Packed, pack
from workers.kernels.reference import dequantize, quantize_activations

Compile = Callable[[str], Emulated]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = tuple(product(("ROWS", "TILES", "NIBBLES"), DTYPES))
WRITTEN = tuple(
    (Scheme(bits, 16, group), dtype) for bits, group, dtype in product(WEIGHT_BITS, GROUP_SIZES, DTYPES[:2])
)

UNWRITTEN = 0x55


@pytest.fixture(scope="module")
def library(emulated: Compile) -> Emulated:
    quantise = (catalogue.quantise(*kind) for kind in KINDS)
    dequantise = (catalogue.dequantise(*kind) for kind in WRITTEN)
    return emulated(catalogue.program([*quantise, *dequantise]))


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def random_tokens(tokens: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Gaussian, each token of its own magnitude; every seventh is zeros."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10 ** (4 * torch.rand(tokens, 1, generator=generator) - 2)
    magnitudes[6::7] = 0
    return (torch.randn(tokens, columns, generator=generator) * magnitudes).to(dtype)


def quantise(
    library: Emulated, layout: str, x: Tensor, bits: int, tokens_padded: int | None = None
) -> tuple[Tensor, Tensor]:
    """The bytes that the kernel writes for all tokens and those of the padding, and the scales."""
    tokens, columns = x.shape
    blocks = tokens_padded or tokens
    size = padded(columns, 128) // (2 if layout == "NIBBLES" else 1)
    codes = torch.full((blocks, size), UNWRITTEN, dtype=torch.uint8)
    scales = torch.full((tokens + 1,), -1.0)
    kernel, most = catalogue.quantise(layout, x.dtype), 2 ** (bits - 1) - 1
    library.launch(kernel.name, (blocks, 1), kernel.threads, x, codes, scales, tokens, columns, most)
    assert scales[-1] == -1
    return codes, scales[:-1]


def laid_out(codes: Tensor, layout: str, tokens_padded: int) -> Tensor:
    """The oracle: every code put where the layout says, one after the other."""
    tokens, columns = codes.shape
    across = padded(columns, 128)
    places = torch.zeros(tokens_padded * across // (2 if layout == "NIBBLES" else 1), dtype=torch.uint8).numpy()
    for m in range(tokens):
        for k in range(columns):
            code = int(codes[m, k])
            c, t, h, j = k // 32, k % 32 // 8, k % 8 // 4, k % 4
            if layout == "ROWS":
                places[m * across + k] = code & 255
            elif layout == "NIBBLES":
                places[m * across // 2 + 4 * (4 * c + t) + j] |= (code & 15) << (0 if h else 4)
            else:
                position = 32 * (c % 4) + 16 * h + 4 * t + j
                atom = (k // 128) * (tokens_padded // 8) + m // 8
                piece = (position // 16) ^ (m % 8)
                places[1024 * atom + 128 * (m % 8) + 16 * piece + position % 16] = code & 255
    return torch.from_numpy(places)


def random_packed(rows: int, columns: int, scheme: Scheme, seed: int) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (scheme.weight_bits - 1)
    codes = torch.randint(-most, most, (rows, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(rows, columns // (scheme.group_size or columns), generator=generator) * 10
    return pack(codes, scales.half(), scheme)


class TestActivations:
    @settings(deadline=None, max_examples=8)
    @given(st.integers(1, 20), st.integers(1, 40), st.sampled_from([8, 6, 4]), st.integers(0, 2**31))
    @pytest.mark.parametrize(("layout", "dtype"), KINDS, ids=str)
    def test_have_the_references_codes_and_scales_where_the_layout_puts_them(
        self, library: Emulated, layout: str, dtype: torch.dtype, tokens: int, chunks: int, bits: int, seed: int
    ) -> None:
        bits = 4 if layout == "NIBBLES" else bits
        x = random_tokens(tokens, 32 * chunks, seed, dtype)
        tokens_padded = padded(tokens, 16) if layout == "TILES" else tokens
        codes, scales = quantise(library, layout, x, bits, tokens_padded)
        expected, expected_scales = quantize_activations(x, bits)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(codes.flatten(), laid_out(expected, layout, tokens_padded))

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.floats(width=32), min_size=32, max_size=32), st.sampled_from([8, 6, 4]))
    def test_of_any_floats_are_the_references(self, library: Emulated, values: list[float], bits: int) -> None:
        x = torch.tensor([values])
        codes, scales = quantise(library, "ROWS", x, bits)
        expected, expected_scales = quantize_activations(x, bits)
        torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes[:, :32].view(torch.int8), expected)

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize(("layout", "dtype"), KINDS, ids=str)
    def test_that_are_not_finite_take_their_token_alone(
        self, library: Emulated, layout: str, dtype: torch.dtype, wrong: float
    ) -> None:
        x = random_tokens(8, 256, 0, dtype)
        x[2, 200] = wrong
        codes, scales = quantise(library, layout, x, 4)
        assert scales.isnan().tolist() == [token == 2 for token in range(8)]
        expected = quantize_activations(x.nan_to_num(0, 0, 0), 4)[0]
        expected[2] = 0
        assert torch.equal(codes.flatten(), laid_out(expected, layout, 8))


class TestWeights:
    @settings(deadline=None, max_examples=3)
    @given(st.integers(1, 70), st.integers(1, 8), st.integers(0, 2**31))
    @pytest.mark.parametrize(("scheme", "dtype"), WRITTEN, ids=str)
    def test_are_written_out_with_one_rounding(
        self, library: Emulated, scheme: Scheme, dtype: torch.dtype, rows: int, groups: int, seed: int
    ) -> None:
        packed = random_packed(rows, (scheme.group_size or 32) * groups, scheme, seed)
        found = torch.full((rows + 1, packed.columns), -777.0, dtype=dtype)
        kernel, operands = catalogue.dequantise(scheme, dtype), (packed.tiles, packed.scales, found)
        blocks = packed.columns_padded // 128, packed.rows_padded // (16 * catalogue.DEQUANTISE_WARPS)
        library.launch(kernel.name, blocks, kernel.threads, *operands, rows, packed.columns)
        assert torch.equal(found[:-1], dequantize(packed).to(dtype))
        assert (found[-1] == -777).all()
