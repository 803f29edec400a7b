"""The reference multiplies codes exactly and rounds once a step, in the order that the kernels repeat."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.scheme import Scheme
from workers.kernels.pack import ACTIVATION_BITS, GROUP_SIZES, MOST_COLUMNS, WEIGHT_BITS, Packed, pack, unpack
from workers.kernels.reference import (
    accumulators,
    dequantize,
    fma,
    matmul,
    matmul_codes,
    part_bounds,
    quantize_activations,
)
from workers.quantizers.activation import round_activation

patient = settings(deadline=None, max_examples=60)

INTEGER_BITS = tuple(bits for bits in ACTIVATION_BITS if bits < 16)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

schemes = st.builds(Scheme, st.sampled_from(WEIGHT_BITS), st.sampled_from(INTEGER_BITS), st.sampled_from(GROUP_SIZES))
splits = st.tuples(st.integers(1, 4), st.integers(1, 4))
seeds = st.integers(0, 2**31)
numbers = st.floats(-(2.0**60), 2.0**60, width=32)


def random_packed(rows: int, columns: int, scheme: Scheme, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (scheme.weight_bits - 1)
    codes = torch.randint(-most, most, (rows, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(rows, columns // (scheme.group_size or columns), generator=generator).to(torch.float16)
    return pack(codes, scales, scheme)


def random_tokens(tokens: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian, each token of its own magnitude."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10 ** (4 * torch.rand(tokens, 1, generator=generator) - 2)
    return (torch.randn(tokens, columns, generator=generator) * magnitudes).to(dtype)


def nearest_float32(exact: Fraction) -> np.float32:
    """The oracle of a rounding: of the neighbouring float32 the nearest, of two the one whose last bit is 0."""
    near = np.float32(float(exact))
    neighbours = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(neighbours, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


def slow_matmul(
    codes: Tensor, token_scales: Tensor, packed: Packed, bias: Tensor | None, slices: int, warps: int
) -> Tensor:
    """The oracle: integers of Python, one rounding a step."""
    weights, scales = (tensor.numpy() for tensor in unpack(packed))
    x, size = codes.numpy().astype(np.int64), packed.scheme.group_size or packed.columns
    grouped, bounds = packed.scheme.group_size is not None, part_bounds(packed.columns, slices * warps)
    result = np.zeros((len(x), packed.rows), np.float32)
    for m in range(len(x)):
        token = np.float32(token_scales[m])
        for n in range(packed.rows):
            totals = []
            for start, stop in bounds if grouped else [(0, packed.columns)]:
                f = np.float32(0)
                for k in range(start, stop, size):
                    acc = int(x[m, k : k + size] @ weights[n, k : k + size].astype(np.int64))
                    scale, rounded = np.float32(scales[n, k // size]), nearest_float32(Fraction(acc))
                    if grouped:
                        f = nearest_float32(Fraction(float(rounded)) * Fraction(float(scale)) + Fraction(float(f)))
                    else:
                        f = (rounded * token) * scale
                totals.append(f)
            y = np.float32(0)
            for first in range(0, len(totals), warps):
                y = y + sum(totals[first : first + warps], np.float32(0))
            y = y * token if grouped else y
            result[m, n] = y if bias is None else y + np.float32(bias[n])
    return torch.from_numpy(result)


class TestActivations:
    @patient
    @given(st.integers(1, 5), st.integers(1, 70), st.sampled_from(INTEGER_BITS), st.floats(-18, 30), seeds)
    def test_are_rounded_as_the_evaluator_rounds_them(
        self, tokens: int, columns: int, bits: int, magnitude: float, seed: int
    ) -> None:
        x = random_tokens(tokens, columns, seed) * 10.0**magnitude
        codes, scales = quantize_activations(x, bits)
        assert codes.dtype == torch.int8
        assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1
        assert torch.equal(codes * scales[:, None], round_activation(x, bits))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_in_half_precision_have_the_codes_of_their_float32(self, dtype: torch.dtype) -> None:
        x = random_tokens(9, 96, dtype=dtype)
        for found, expected in zip(quantize_activations(x, 8), quantize_activations(x.float(), 8), strict=True):
            assert torch.equal(found, expected)

    def test_halves_go_to_the_even_code(self) -> None:
        x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]])
        assert quantize_activations(x, 8)[0].tolist() == [[127, 0, 2, -2, -127]]

    def test_a_token_of_zeros_has_a_scale(self) -> None:
        codes, scales = quantize_activations(torch.zeros(1, 32), 6)
        assert not codes.any()
        assert scales.item() == np.float32(1e-12) / np.float32(31)

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
    def test_a_token_that_is_not_finite_becomes_nan_alone(self, wrong: float) -> None:
        x = random_tokens(3, 64)
        x[1, 7] = wrong
        codes, scales = quantize_activations(x, 8)
        assert scales.isnan().tolist() == [False, True, False]
        assert not codes[1].any()
        for text in ("w4a8", "w6a6g32"):
            output = matmul(x, random_packed(5, 64, Scheme.parse(text)))
            assert output.isnan().all(1).tolist() == [False, True, False]
            assert output[[0, 2]].isfinite().all()


class TestFma:
    @settings(deadline=None, max_examples=500)
    @given(numbers, numbers, numbers)
    # A tie in float64 that the exact sum is below, and above; a subnormal.
    @example(2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-23)
    @example(-(2.0**-12) * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-22)
    @example(2.0**-70, 2.0**-79, 2.0**-149)
    def test_rounds_once(self, a: float, b: float, c: float) -> None:
        found = fma(*(torch.tensor([x], dtype=torch.float32) for x in (a, b, c)))
        assert found.item() == nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))

    def test_rounding_twice_would_be_another_number(self) -> None:
        a, b, c = 2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-23
        twice = torch.tensor(a * b + c, dtype=torch.float64).float()
        assert twice != fma(*(torch.tensor(x) for x in (a, b, c)))

    @settings(deadline=None, max_examples=200)
    @given(st.integers(-(2**31), 2**31 - 1), st.floats(0, 65504, width=16), st.floats(-(2.0**40), 2.0**40, width=32))
    def test_adds_a_scaled_sum_of_products_with_one_rounding(self, acc: int, scale: float, f: float) -> None:
        rounded = torch.tensor([acc], dtype=torch.int32).float()
        found = fma(rounded, torch.tensor([scale]), torch.tensor([f]))
        assert found.item() == nearest_float32(Fraction(rounded.item()) * Fraction(scale) + Fraction(f))


class TestSums:
    @patient
    @given(schemes, st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), seeds)
    def test_are_exact_integers(self, scheme: Scheme, rows: int, tokens: int, groups: int, seed: int) -> None:
        columns = (scheme.group_size or 32) * groups
        packed = random_packed(rows, columns, scheme, seed)
        codes, _ = quantize_activations(random_tokens(tokens, columns, seed), scheme.activation_bits)
        x = codes.numpy().astype(np.int64).reshape(tokens, -1, scheme.group_size or columns)
        weights = unpack(packed)[0].numpy().astype(np.int64).reshape(rows, *x.shape[1:])
        found = accumulators(codes, packed)
        assert found.dtype == torch.int32
        assert np.array_equal(found.numpy(), np.einsum("mgk,ngk->gmn", x, weights))

    @pytest.mark.parametrize("bits", WEIGHT_BITS)
    def test_are_exact_where_every_product_is_as_great_as_can_be(self, bits: int) -> None:
        columns, least = MOST_COLUMNS, -(2 ** (bits - 1))
        weights = torch.full((3, columns), least, dtype=torch.int8)
        weights[1] = -least - 1
        # One odd product, which a sum that is rounded anywhere would lose.
        weights[2, 0] += 1
        codes = torch.full((2, columns), 127, dtype=torch.int8)
        codes[1] = -128
        sums = accumulators(codes, pack(weights, torch.ones(3, 1), Scheme(bits, 8)))
        of_weights = [least * columns, -(least + 1) * columns, least * columns + 1]
        assert sums.tolist() == [[[code * weight for weight in of_weights] for code in (127, -128)]]


class TestProduct:
    @settings(deadline=None, max_examples=100)
    @given(schemes, st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), splits, st.booleans(), seeds)
    def test_is_that_of_the_oracle_bit_for_bit(
        self, scheme: Scheme, rows: int, tokens: int, groups: int, split: tuple[int, int], biased: bool, seed: int
    ) -> None:
        columns = (scheme.group_size or 96) * groups
        packed = random_packed(rows, columns, scheme, seed)
        x = random_tokens(tokens, columns, seed)
        bias = random_tokens(1, rows, seed)[0] if biased else None
        codes, scales = quantize_activations(x, scheme.activation_bits)
        expected = slow_matmul(codes, scales, packed, bias, *split)
        assert torch.equal(matmul(x, packed, bias, *split), expected)
        assert torch.equal(matmul_codes(codes, scales, packed, bias, *split), expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("text", ["w6a8", "w4a8g32"])
    def test_is_rounded_to_its_type_last(self, text: str, dtype: torch.dtype) -> None:
        packed, x = random_packed(7, 96, Scheme.parse(text)), random_tokens(4, 96, dtype=dtype)
        bias = random_tokens(1, 7)[0].to(dtype)
        result = matmul(x, packed, bias)
        assert result.dtype == dtype
        assert torch.equal(result, matmul(x.float(), packed, bias.float()).to(dtype))
        assert torch.equal(matmul(x, packed, bias, out_dtype=torch.float32).to(dtype), result)

    def test_of_parts_differs_from_the_whole_where_scales_are_by_group_only(self) -> None:
        x = random_tokens(8, 1024)
        grouped, by_channel = (random_packed(32, 1024, Scheme.parse(text)) for text in ("w6a8g32", "w6a8"))
        found = [matmul(x, grouped, slices=slices, warps=warps) for slices, warps in ((1, 1), (4, 1), (2, 2), (1, 4))]
        # Warps of one slice are added like slices of one warp.
        assert [torch.equal(found[1], other) for other in found] == [False, True, False, True]
        assert torch.equal(matmul(x, by_channel), matmul(x, by_channel, slices=4))

    @pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
    @pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
    def test_stands_for_the_product_of_rounded_numbers(self, weight_bits: int, activation_bits: int) -> None:
        for group in GROUP_SIZES:
            packed = random_packed(40, 256, Scheme(weight_bits, activation_bits, group))
            x = random_tokens(6, 256)
            rounded = round_activation(x, activation_bits) if activation_bits < 16 else x
            expected = rounded.double() @ dequantize(packed).double().T
            terms = rounded.double().abs() @ dequantize(packed).double().abs().T
            assert ((matmul(x, packed).double() - expected).abs() <= (256 + 3) * 2.0**-24 * terms).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_16_bit_activations_is_within_its_tolerance(self, dtype: torch.dtype) -> None:
        columns = 4096
        packed, x = random_packed(33, columns, Scheme(5, 16, 64)), random_tokens(5, columns, dtype=dtype)
        exact = x.double() @ dequantize(packed).double().T
        terms = x.double().abs() @ dequantize(packed).double().abs().T
        result = matmul(x, packed, out_dtype=torch.float32)
        assert ((result.double() - exact).abs() <= (columns + 3) * 2.0**-24 * terms).all()

    def test_of_no_tokens_is_empty(self) -> None:
        for text in ("w4a16", "w4a8", "w4a8g32"):
            assert matmul(torch.zeros(0, 64), random_packed(3, 64, Scheme.parse(text))).shape == (0, 3)


@given(st.integers(1, 5000), st.integers(1, 40))
def test_parts_are_runs_of_whole_tiles_that_cover_the_inputs(columns: int, parts: int) -> None:
    bounds = part_bounds(columns, parts)
    assert len(bounds) <= parts
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == columns
    assert all(start < stop and start % 128 == 0 for start, stop in bounds)


@patient
@given(schemes, st.integers(1, 5), st.integers(1, 5), seeds)
def test_a_dequantized_weight_is_codes_times_scales(scheme: Scheme, rows: int, groups: int, seed: int) -> None:
    packed = random_packed(rows, (scheme.group_size or 32) * groups, scheme, seed)
    codes, scales = (tensor.double() for tensor in unpack(packed))
    expected = codes * scales.repeat_interleave(packed.columns // scales.shape[1], 1)
    assert torch.equal(dequantize(packed).double(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
def test_a_gpu_gives_the_same_bits(weight_bits: int, group: int | None) -> None:
    scheme = Scheme(weight_bits, 8, group)
    packed, x = random_packed(70, 384, scheme), random_tokens(9, 384)
    there = pack(*(tensor.cuda() for tensor in unpack(packed)), scheme)
    assert torch.equal(there.tiles.cpu(), packed.tiles)
    assert torch.equal(there.scales.cpu(), packed.scales)
    assert torch.equal(unpack(there)[0].cpu(), unpack(packed)[0])
    assert torch.equal(matmul(x.cuda(), there, slices=2).cpu(), matmul(x, packed, slices=2))
