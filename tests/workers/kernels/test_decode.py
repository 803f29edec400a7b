"""The decode kernel on the emulator: equal to the reference bit for bit where the sums are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.scheme import Scheme
from workers.kernels import catalogue, reference
from workers.kernels.emulator.build import Emulated
from workers.kernels.pack import GROUP_SIZES, MOST_COLUMNS, TILE_COLUMNS, WEIGHT_BITS, Packed, pack

pytestmark = pytest.mark.long

Compile = Callable[[str], Emulated]

GUARD = 64
"""Elements behind the output that nobody may write."""


@dataclass(frozen=True)
class Variant:
    """One instantiation: what it multiplies, and the shape of its work."""

    scheme: Scheme
    strips: int
    warps: int
    token_tiles: int
    inputs: torch.dtype
    outputs: torch.dtype

    @property
    def kernel(self) -> catalogue.Decode:
        shape = self.strips, self.warps, self.token_tiles
        return catalogue.decode(self.scheme, self.inputs, self.outputs, *shape)


def variants(inputs: tuple[torch.dtype, ...], outputs: tuple[torch.dtype, ...], each: int) -> tuple[Variant, ...]:
    """Every width, group and type of inputs, with `each` of the shapes and types of outputs in turn."""
    shapes = cycle([(1, 4, 1), (2, 1, 2), (2, 3, 4), (4, 2, 1), (1, 4, 2)])
    kinds = cycle(outputs)
    return tuple(
        Variant(Scheme(bits, 8 if kind == torch.int8 else 16, group), *next(shapes), kind, next(kinds))
        for bits, group, kind, _ in product(WEIGHT_BITS, GROUP_SIZES, inputs, range(each))
    )


OF_CODES = variants((torch.int8,), (torch.float32, torch.float16, torch.bfloat16), each=2)
OF_FLOATS = variants((torch.float16, torch.bfloat16), (torch.float32,), each=1)

of_every = {"argnames": "variant", "ids": lambda variant: variant.kernel.name}


def program(variants: tuple[Variant, ...]) -> str:
    return catalogue.program(variant.kernel for variant in variants)


@pytest.fixture(scope="module")
def of_codes(emulated: Compile) -> Emulated:
    return emulated(program(OF_CODES))


@pytest.fixture(scope="module")
def of_floats(emulated: Compile) -> Emulated:
    return emulated(program(OF_FLOATS))


@dataclass(frozen=True)
class Problem:
    """Random operands of a shape; `extreme` takes the ends of every range only."""

    tokens: int
    rows: int
    columns: int
    biased: bool
    extreme: bool
    seed: int

    def packed(self, variant: Variant) -> Packed:
        generator = torch.Generator().manual_seed(self.seed)
        most = 2 ** (variant.scheme.weight_bits - 1)
        codes = torch.randint(-most, most, (self.rows, self.columns), dtype=torch.int8, generator=generator)
        if self.extreme:
            codes = torch.where(codes < 0, -most, most - 1).to(torch.int8)
        groups = self.columns // (variant.scheme.group_size or self.columns)
        scales = torch.rand(self.rows, groups, generator=generator).half()
        return pack(codes, scales, variant.scheme)

    def x(self, variant: Variant) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        if variant.inputs != torch.int8:
            return torch.randn(self.tokens, self.columns, generator=generator).to(variant.inputs)
        codes = torch.randint(-127, 128, (self.tokens, self.columns), dtype=torch.int8, generator=generator)
        return torch.where(codes < 0, -127, 127).to(torch.int8) if self.extreme else codes

    def token_scales(self) -> Tensor:
        return torch.rand(self.tokens, generator=torch.Generator().manual_seed(self.seed + 2))

    def bias(self) -> Tensor | None:
        return torch.randn(self.rows, generator=torch.Generator().manual_seed(self.seed + 3)) if self.biased else None


@st.composite
def problems(draw: st.DrawFn, variant: Variant) -> Problem:
    multiple = variant.scheme.group_size or 32
    return Problem(
        tokens=draw(st.integers(1, 8 * variant.token_tiles)),
        rows=draw(st.integers(1, 80)),
        columns=multiple * draw(st.integers(1, 1300 // multiple)),
        biased=draw(st.booleans()),
        extreme=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def decode(
    library: Emulated,
    variant: Variant,
    packed: Packed,
    x: Tensor,
    token_scales: Tensor | None,
    bias: Tensor | None,
    slices: int = 1,
    reverse: bool = False,
) -> Tensor:
    """Launch the kernel on memory that was full of something else; nothing but the output may have changed after."""
    tokens, rows_padded = len(x), packed.rows_padded
    if x.dtype == torch.int8:
        x = torch.nn.functional.pad(x, (0, packed.columns_padded - packed.columns))
    output = torch.full((tokens * packed.rows + GUARD,), -777.0, dtype=variant.outputs)
    partial = torch.full((rows_padded * 8 * variant.token_tiles * slices,), -1, dtype=torch.int32)
    tickets = torch.zeros(rows_padded // 16, dtype=torch.int32)
    kernel, operands = variant.kernel, (packed.tiles, packed.scales, x, token_scales, bias, output, partial, tickets)
    blocks, shape = kernel.blocks(packed.rows, slices), (tokens, packed.rows, packed.columns)
    library.launch(kernel.name, blocks, kernel.threads, *operands, *shape, reverse=reverse)
    assert not tickets.any()
    assert (output[-GUARD:] == -777).all()
    return output[:-GUARD].view(tokens, packed.rows)


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


class TestOfCodes:
    @settings(deadline=None, max_examples=6)
    @given(st.data())
    @pytest.mark.parametrize(argvalues=OF_CODES, **of_every)
    def test_is_the_reference_bit_for_bit(self, of_codes: Emulated, variant: Variant, data: st.DataObject) -> None:
        problem = data.draw(problems(variant))
        slices, reverse = data.draw(st.integers(1, 5)), data.draw(st.booleans())
        packed, x, scales, bias = problem.packed(variant), problem.x(variant), problem.token_scales(), problem.bias()
        found = decode(of_codes, variant, packed, x, scales, bias, slices, reverse)
        expected = reference.matmul_codes(x, scales, packed, bias, slices, variant.warps, variant.outputs)
        assert same(found, expected)

    @pytest.mark.parametrize("bits", WEIGHT_BITS)
    def test_adds_up_the_most_products_without_overflow(self, of_codes: Emulated, bits: int) -> None:
        variant = next(v for v in OF_CODES if v.scheme == Scheme(bits, 8))
        columns, least = MOST_COLUMNS, -(2 ** (bits - 1))
        scale = 2.0**-24  # Results fit float16 too.
        packed = pack(torch.full((16, columns), least, dtype=torch.int8), torch.full((16, 1), scale), variant.scheme)
        x = torch.full((2, columns), 127, dtype=torch.int8)
        x[1] = -128  # No quantiser of ours makes it, but a caller may.
        found = decode(of_codes, variant, packed, x, torch.ones(2), None, slices=2)
        expected = torch.tensor([[127.0], [-128.0]]).expand(2, 16) * (least * columns * scale)
        assert torch.equal(found, expected.to(variant.outputs))

    @pytest.mark.parametrize("group", [None, 64])
    def test_of_a_token_that_was_not_finite_is_nan(self, of_codes: Emulated, group: int | None) -> None:
        variant = next(v for v in OF_CODES if v.scheme.group_size == group and v.token_tiles == 2)
        problem = Problem(tokens=3, rows=20, columns=256, biased=True, extreme=False, seed=0)
        x, scales = problem.x(variant), torch.tensor([1.0, torch.nan, 1.0])
        x[1] = 0
        found = decode(of_codes, variant, problem.packed(variant), x, scales, problem.bias(), slices=2)
        assert found.isnan().all(1).tolist() == [False, True, False]
        assert found[[0, 2]].isfinite().all()

    @settings(deadline=None, max_examples=40)
    @given(st.sampled_from([v for v in OF_CODES if v.outputs == torch.float32]), st.integers(0, 2**31), st.data())
    def test_shows_every_flipped_bit_in_its_row(
        self, of_codes: Emulated, variant: Variant, seed: int, data: st.DataObject
    ) -> None:
        problem = Problem(tokens=2, rows=64, columns=256, biased=False, extreme=False, seed=seed)
        packed, scales = problem.packed(variant), torch.ones(2)
        packed.scales.fill_(1.0)  # All sums are exact in float32.
        # No code is 0, so that every weight counts.
        x = problem.x(variant) | 1
        before = decode(of_codes, variant, packed, x, scales, None)
        byte = data.draw(st.integers(0, len(packed.tiles) - 1))
        packed.tiles[byte] ^= 1 << data.draw(st.integers(0, 7))
        after = decode(of_codes, variant, packed, x, scales, None)
        strip_bytes = len(packed.tiles) // 4
        changed = (before != after).any(0).nonzero().flatten().tolist()
        assert len(changed) == 1
        assert changed[0] // 16 == byte // strip_bytes


class TestOfFloats:
    @settings(deadline=None, max_examples=4)
    @given(st.data())
    @pytest.mark.parametrize(argvalues=OF_FLOATS, **of_every)
    def test_is_near_the_reference_and_always_the_same(
        self, of_floats: Emulated, variant: Variant, data: st.DataObject
    ) -> None:
        problem, slices = data.draw(problems(variant)), data.draw(st.integers(1, 5))
        packed, x, bias = problem.packed(variant), problem.x(variant), problem.bias()
        found = decode(of_floats, variant, packed, x, None, bias, slices)
        assert same(found, decode(of_floats, variant, packed, x, None, bias, slices, reverse=True))
        weight = reference.dequantize(packed)
        bound = 2 * (packed.columns + 3) * 2**-24 * (x.double().abs() @ weight.double().abs().T)
        expected = reference.matmul(x, packed, bias, out_dtype=torch.float32)
        assert ((found - expected).abs() <= bound + 2**-23 * expected.abs()).all()

    def test_shows_what_is_not_finite_in_its_token_alone(self, of_floats: Emulated) -> None:
        variant = next(v for v in OF_FLOATS if v.token_tiles == 2)
        # Not a multiple of 128: what lies behind a token must not be read as part of it.
        problem = Problem(tokens=3, rows=20, columns=TILE_COLUMNS + 32, biased=False, extreme=True, seed=0)
        x = problem.x(variant)
        x[1] = torch.inf
        x[2, 0] = torch.nan
        found = decode(of_floats, variant, problem.packed(variant), x, None, None)
        assert found[0].isfinite().all()
        assert not found[1].isfinite().any()
        assert found[2].isnan().all()
