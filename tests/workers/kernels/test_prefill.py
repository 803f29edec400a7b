"""The prefill kernels on the emulator: equal to the reference bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.scheme import Scheme
from workers.kernels import reference
from workers.kernels.catalogue import Prefill, prefill, program, quantise
from workers.kernels.emulator.build import Emulated
from workers.kernels.pack import GROUP_SIZES, MOST_COLUMNS, WEIGHT_BITS, Packed, pack

pytestmark = pytest.mark.long

Compile = Callable[[str], Emulated]

GUARD = 64
"""Elements behind the output that nobody may write."""

MOST = {4: 7, 6: 31, 8: 127}


@dataclass(frozen=True)
class Variant:
    """A kernel with the scheme and type that it was made for."""

    scheme: Scheme
    out: torch.dtype
    kernel: Prefill


def variants(
    architecture: str, activation_bits: int, weight_bits: tuple[int, ...], tile_tokens: int = 128
) -> list[Variant]:
    """Every width and group, with the types of results in turn."""
    outs = cycle([torch.float16, torch.bfloat16, torch.float32])
    schemes = [Scheme(bits, activation_bits, group) for bits in weight_bits for group in GROUP_SIZES]
    made = []
    for scheme, out in zip(schemes, outs, strict=False):
        if tile_tokens == 128 or scheme.group_size is None:
            made.append(Variant(scheme, out, prefill(scheme, architecture, out, tile_tokens)))
    return made


HOPPER = variants("sm_90a", 8, WEIGHT_BITS) + variants("sm_90a", 8, WEIGHT_BITS, tile_tokens=256)
AMPERE = variants("sm_80", 8, WEIGHT_BITS) + [v for v in variants("sm_80", 4, (4,)) if v.kernel.layout == "NIBBLES"]
VARIANTS = HOPPER + AMPERE
FLOAT32 = [variant for variant in VARIANTS if variant.out == torch.float32]


@pytest.fixture(scope="module")
def library(emulated: Compile) -> Callable[[Variant], Emulated]:
    programs = {
        header: program(v.kernel for v in VARIANTS if v.kernel.header == header)
        for header in {v.kernel.header for v in VARIANTS}
    }
    return lambda variant: emulated(programs[variant.kernel.header])


@dataclass(frozen=True)
class Problem:
    """Random operands of a shape; `extreme` takes the ends of every range only."""

    tokens: int
    rows: int
    columns: int
    extreme: bool
    seed: int

    def _integers(self, least: int, most: int, shape: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        codes = torch.randint(least, most + 1, shape, dtype=torch.int8, generator=generator)
        return torch.where(codes < 0, least, most).to(torch.int8) if self.extreme else codes

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(self.seed + 1))

    def packed(self, scheme: Scheme) -> Packed:
        most = 2 ** (scheme.weight_bits - 1)
        codes = self._integers(-most, most - 1, (self.rows, self.columns))
        return pack(codes, self._uniform(self.rows, self.columns // (scheme.group_size or self.columns)).half(), scheme)

    def codes(self, scheme: Scheme) -> Tensor:
        most = MOST[scheme.activation_bits]
        return self._integers(-most, most, (self.tokens, self.columns))

    def token_scales(self) -> Tensor:
        return self._uniform(self.tokens)

    def bias(self) -> Tensor:
        return self._uniform(self.rows) - 0.5


def problems(variant: Variant, most_rows: int = 200, most_tokens: int = 300) -> st.SearchStrategy[Problem]:
    multiple = variant.scheme.group_size or 32
    return st.builds(
        Problem,
        tokens=st.integers(1, most_tokens),
        rows=st.integers(1, most_rows),
        columns=st.integers(1, 900 // multiple).map(lambda count: count * multiple),
        extreme=st.booleans(),
        seed=st.integers(0, 2**31),
    )


def tiles(codes: Tensor) -> Tensor:
    """[inputs / 128][tokens / 8] atoms of 8 tokens × 8 pieces of 16 bytes; piece p of token r is at p ^ r."""
    tokens, columns = codes.shape
    # Of 32 inputs, 8t + 4h + j stands at 16h + 4t + j.
    split = codes.view(tokens // 8, 8, columns // 128, 4, 4, 2, 4).permute(2, 0, 1, 3, 5, 4, 6)
    pieces = split.reshape(columns // 128, tokens // 8, 8, 8, 16)
    swizzled = torch.empty_like(pieces)
    for r in range(8):
        for p in range(8):
            swizzled[:, :, r, p ^ r] = pieces[:, :, r, p]
    return swizzled


def nibbles(codes: Tensor) -> Tensor:
    """tokens × inputs / 2 bytes: of 8 inputs, byte j holds input j above input 4 + j."""
    eights = codes.view(codes.shape[0], -1, 2, 4)
    return eights[:, :, 0] << 4 | eights[:, :, 1] & 15


def laid_out(codes: Tensor, kernel: Prefill, spare: int) -> tuple[Tensor, int]:
    """Codes as the kernel takes them, with garbage for tokens that do not exist; and how many tokens it is told of."""
    tokens, columns = codes.shape
    padded = (-(-tokens // kernel.multiple) + spare) * kernel.multiple
    wide = torch.randint(-7, 8, (padded, -(-columns // 128) * 128), dtype=torch.int8)
    wide[:tokens] = torch.nn.functional.pad(codes, (0, wide.shape[1] - columns))
    return (tiles(wide) if kernel.layout == "TILES" else nibbles(wide)).contiguous(), padded


def multiply(
    library: Emulated,
    variant: Variant,
    codes: Tensor,
    token_scales: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    spare: int = 0,
    multiprocessors: int = 2,
    reverse: bool = False,
) -> Tensor:
    """Launch the kernel on memory that was full of something else; nothing behind the output may have changed after."""
    kernel, tokens = variant.kernel, len(codes)
    arranged, padded = laid_out(codes, kernel, spare)
    output = torch.full((tokens * packed.rows + GUARD,), -777.0, dtype=variant.out)
    blocks = kernel.blocks(packed.rows, tokens, multiprocessors)
    operands = packed.tiles, packed.scales, arranged, token_scales, bias, output
    sizes = packed.rows, packed.columns, tokens, padded
    library.launch(
        kernel.name, blocks, kernel.threads, *operands, *sizes, shared_bytes=kernel.shared_bytes, reverse=reverse
    )
    assert (output[-GUARD:] == -777).all()
    return output[:-GUARD].view(tokens, packed.rows)


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


@settings(deadline=None, max_examples=3)
@given(st.data())
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.kernel.name)
def test_is_the_reference_bit_for_bit(
    library: Callable[[Variant], Emulated], variant: Variant, data: st.DataObject
) -> None:
    problem = data.draw(problems(variant))
    packed, codes = problem.packed(variant.scheme), problem.codes(variant.scheme)
    bias = problem.bias() if data.draw(st.booleans()) else None
    found = multiply(
        library(variant),
        variant,
        codes,
        problem.token_scales(),
        packed,
        bias,
        spare=data.draw(st.integers(0, 9)),
        multiprocessors=data.draw(st.integers(1, 3)),
        reverse=data.draw(st.booleans()),
    )
    expected = reference.matmul_codes(codes, problem.token_scales(), packed, bias, out_dtype=variant.out)
    assert same(found, expected)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(FLOAT32), st.integers(0, 2**31), st.data())
def test_shows_every_flipped_bit_in_its_row(
    library: Callable[[Variant], Emulated], variant: Variant, seed: int, data: st.DataObject
) -> None:
    problem = Problem(tokens=9, rows=128, columns=256, extreme=False, seed=seed)
    packed, scales = problem.packed(variant.scheme), torch.ones(9)
    packed.scales.fill_(1.0)  # All sums are exact in float32.
    # No code is 0, so that every weight counts.
    codes = problem.codes(variant.scheme) | 1
    before = multiply(library(variant), variant, codes, scales, packed)
    byte = data.draw(st.integers(0, len(packed.tiles) - 1))
    packed.tiles[byte] ^= 1 << data.draw(st.integers(0, 7))
    changed = (before != multiply(library(variant), variant, codes, scales, packed)).any(0).nonzero().flatten().tolist()
    assert len(changed) == 1
    assert changed[0] // 16 == byte // (len(packed.tiles) // 8)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(FLOAT32), st.integers(0, 2**31), st.data())
def test_shows_every_changed_code_in_its_token(
    library: Callable[[Variant], Emulated], variant: Variant, seed: int, data: st.DataObject
) -> None:
    tokens = variant.kernel.tile_tokens + 5
    problem = Problem(tokens, rows=16, columns=256, extreme=False, seed=seed)
    packed, scales = problem.packed(variant.scheme), torch.ones(tokens)
    packed.scales.fill_(1.0)
    codes = problem.codes(variant.scheme)
    before = multiply(library(variant), variant, codes, scales, packed)
    token = data.draw(st.integers(0, tokens - 1))
    codes[token, data.draw(st.integers(0, 255))] ^= 1
    changed = (before != multiply(library(variant), variant, codes, scales, packed)).any(1).nonzero().flatten().tolist()
    assert changed == [token]


@pytest.mark.parametrize("variant", [HOPPER[16], AMPERE[16]], ids=lambda variant: variant.kernel.name)
def test_adds_up_the_most_products_without_overflow(library: Callable[[Variant], Emulated], variant: Variant) -> None:
    assert (variant.scheme.weight_bits, variant.scheme.group_size) == (8, None)
    columns, scale = MOST_COLUMNS, 2.0**-24
    packed = pack(torch.full((16, columns), -128, dtype=torch.int8), torch.full((16, 1), scale), variant.scheme)
    codes = torch.full((2, columns), 127, dtype=torch.int8)
    codes[1] = -128  # No quantiser of ours makes it, but a caller may.
    found = multiply(library(variant), variant, codes, torch.ones(2), packed)
    expected = torch.tensor([[127.0], [-128.0]]).expand(2, 16) * (-128 * columns * scale)
    assert torch.equal(found, expected.to(variant.out))


def test_on_hopper_codes_are_found_wherever_their_token_is(emulated: Compile) -> None:
    text = """
    #include "prefill_wgmma.cuh"
    extern "C" __global__ void places(const int* tokens, long long* places) {
        places[thread()] = PrefillWgmma<8, 0, 128, 4, float>::from(tokens[thread()]);
    }"""
    tokens = torch.arange(32, dtype=torch.int32) * 8 * 2**22  # The last ones' codes lie beyond 2^31 bytes.
    places = torch.empty(32, dtype=torch.int64)
    emulated(text).launch("places", (1, 1), 32, tokens, places)
    assert places.tolist() == [token * 128 for token in tokens.tolist()]


@pytest.mark.parametrize(
    "variant", [HOPPER[0], HOPPER[1], AMPERE[0], AMPERE[1]], ids=lambda variant: variant.kernel.name
)
def test_of_a_token_that_was_not_finite_is_nan(library: Callable[[Variant], Emulated], variant: Variant) -> None:
    problem = Problem(tokens=3, rows=20, columns=256, extreme=False, seed=0)
    codes, scales = problem.codes(variant.scheme), torch.tensor([1.0, torch.nan, 1.0])
    codes[1] = 0
    found = multiply(library(variant), variant, codes, scales, problem.packed(variant.scheme), problem.bias())
    assert found.isnan().all(1).tolist() == [False, True, False]
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("variant", [HOPPER[4], AMPERE[4], AMPERE[-1]], ids=lambda variant: variant.kernel.name)
def test_takes_codes_as_quantise_lays_them_out(emulated: Compile, variant: Variant) -> None:
    kernel, scheme = variant.kernel, variant.scheme
    quantiser = quantise(kernel.layout, torch.float16)
    library = emulated(program([quantiser, kernel]))
    problem = Problem(tokens=70, rows=100, columns=384, extreme=False, seed=0)
    x = torch.randn(problem.tokens, problem.columns, generator=torch.Generator().manual_seed(0)).half()
    packed, padded = problem.packed(scheme), 72
    codes = torch.full((padded * problem.columns // (2 if kernel.layout == "NIBBLES" else 1),), 85, dtype=torch.uint8)
    scales, y = torch.empty(problem.tokens), torch.empty(problem.tokens, problem.rows, dtype=variant.out)
    sizes = problem.tokens, problem.columns, MOST[scheme.activation_bits]
    library.launch(quantiser.name, (padded, 1), quantiser.threads, x, codes, scales, *sizes)
    operands = packed.tiles, packed.scales, codes, scales, None, y
    sizes = problem.rows, problem.columns, problem.tokens
    library.launch(kernel.name, kernel.blocks(*sizes[::2], 2), kernel.threads, *operands, *sizes, padded)
    assert same(y, reference.matmul(x, packed, out_dtype=variant.out))


def test_a_persistent_grid_is_no_larger_than_its_tiles() -> None:
    hopper, ampere = HOPPER[-1].kernel, AMPERE[0].kernel
    assert hopper.blocks(8192, 4096, 132) == (132, 1)
    assert hopper.blocks(200, 300, 132) == (4, 1)
    assert ampere.blocks(8192, 4096, 108) == (64 * 32, 1)


def test_the_order_of_tiles_reaches_each_once(emulated: Compile) -> None:
    text = """
    #include "prefill.cuh"
    extern "C" __global__ void order(int* seen, int rows, int tokens, int across) {
        const TileOrder<128, 256> order(rows, tokens);
        for (int tile = thread(); tile < order.count(); tile += 32) {
            int row, token;
            order.place(tile, row, token);
            ++seen[row / 128 * across + token / 256];
        }
    }"""
    for rows, tokens in [(1, 1), (300, 5000), (128, 2048), (1000, 2049), (4096, 256)]:
        down, across = -(-rows // 128), -(-tokens // 256)
        seen = torch.zeros(down * across + GUARD, dtype=torch.int32)
        emulated(text).launch("order", (1, 1), 32, seen, rows, tokens, across)
        assert seen.tolist() == [1] * (down * across) + [0] * GUARD
