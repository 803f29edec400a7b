"""What the kernels compute, in plain torch on any device: the fallback, and the oracle that they equal bit for bit.

Integer activations: exact int32 sums of products of codes, then float32 scales, every step one IEEE rounding,

    per channel:  y = (float(Σ_k w_k·x_k) · token scale) · channel scale
    grouped:      f ← fmaf(float(Σ_{k in group} w_k·x_k), group scale, f), group after group; y = f · token scale

then + bias, then rounded to the output type. Where K is cut into parts for the warps of several slices (CTAs), f starts
anew in each part; the warps of a slice are added in order, then the slices are. 16-bit activations:
y = Σ_k x_k·(w_k·scale) in float32, in no particular order. In decode, a kernel lies within

    4·K·2⁻²⁴·Σ_k |x_k·w_k·scale|

of it, before the rounding to the output type: both sums have K terms, and tensor cores cut off where torch rounds.
Prefill rounds each w_k·scale, and the bias, to the activations' type first, and leaves the sum to cuBLAS: the bound is

    (u + 4·K·2⁻²⁴)·Σ_k |x_k·w_k·scale| + u·|bias|,    u = 2⁻¹¹ in float16, 2⁻⁸ in bfloat16

where float16 represents the weights as normal numbers (from 2⁻¹⁴ to 65504 in magnitude; a smaller one is off by up to
2⁻²⁵), and where torch may not add parts of a sum in 16 bits (`allow_fp16_reduced_precision_reduction`, and bf16's).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from workers.kernels.pack import TILE_COLUMNS, Packed, unpack

SMALLEST_MAXIMUM = 1e-12
"""A token's greatest magnitude is taken as at least this, so that zeros have a scale."""

EXACT_TERMS = 1024
"""A product of codes is at most 2^14 in magnitude, so that many stay within 2^24: float32 holds every integer."""


def quantize_activations(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes (int8, M × K) and scales (float32, M) of M tokens, as `quantizers.activation` rounds float32.

    A scale is its token's greatest magnitude / (2^(bits−1) − 1). A token with NaN or Inf has the scale NaN and codes 0.
    """
    wide = x.float()
    most = torch.tensor(2.0 ** (bits - 1) - 1, device=x.device)
    # Divided by a tensor: by a number, torch multiplies by the reciprocal on CUDA, which rounds differently.
    scales = wide.abs().amax(-1).clamp_min(SMALLEST_MAXIMUM) / most
    codes = (wide / scales[:, None]).round().clamp(-most, most)
    finite = scales.isfinite()
    return codes.where(finite[:, None], 0).to(torch.int8), scales.where(finite, torch.nan)


def matmul(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    slices: int = 1,
    warps: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x · weightᵀ + bias, M × N, for x of M × K in float16, bfloat16 or float32; in x's type unless told otherwise.

    `slices` and `warps` matter where scales are per group and activations are codes.
    """
    out_dtype = out_dtype or x.dtype
    if packed.scheme.quantizes_activations:
        codes, scales = quantize_activations(x, packed.scheme.activation_bits)
        return matmul_codes(codes, scales, packed, bias, slices, warps, out_dtype)
    wide = _exact_dtype(x.device)
    # A code times its float16 scale has 19 significant bits: exact.
    product = (x.to(wide) @ dequantize(packed).to(wide).T).float()
    return _finished(product, bias, out_dtype)


def matmul_codes(
    codes: Tensor,
    token_scales: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    slices: int = 1,
    warps: int = 1,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`matmul` of activations that are codes already (int8, M × K, with float32 scales, M)."""
    weights, scales = unpack(packed)
    if packed.scheme.group_size is None:
        (sums,) = _group_sums(codes, weights, None)
        return _finished(sums.float() * token_scales[:, None] * scales.float().T, bias, out_dtype)
    parts = [
        _scaled_sum(codes[:, start:stop], weights[:, start:stop], scales, packed.scheme.group_size, start)
        for start, stop in part_bounds(packed.columns, slices * warps)
    ]
    by_slice = [reduce(torch.add, parts[first : first + warps]) for first in range(0, len(parts), warps)]
    return _finished(reduce(torch.add, by_slice) * token_scales[:, None], bias, out_dtype)


def accumulators(codes: Tensor, packed: Packed) -> Tensor:
    """The integer sums of products before any scale: int32, groups × M × N (one group where scales are per channel)."""
    return torch.stack(list(_group_sums(codes, unpack(packed)[0], packed.scheme.group_size)))


def dequantize(packed: Packed) -> Tensor:
    """The weight, N × K in float32, exactly."""
    codes, scales = unpack(packed)
    grouped = codes.view(packed.rows, scales.shape[1], -1) * scales.float()[:, :, None]
    return grouped.view(packed.rows, packed.columns)


def part_bounds(columns: int, parts: int) -> list[tuple[int, int]]:
    """[start, stop) of each part of the inputs: runs of ⌈tiles / parts⌉ whole tiles, but none that is empty."""
    tiles = -(-columns // TILE_COLUMNS)
    width = -(-tiles // parts) * TILE_COLUMNS
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c of float32 with one rounding, as fmaf.

    In float64 the product is exact. Its sum with c is rounded to odd (Boldo and Melquiond, 2008): where it is inexact,
    to the neighbour whose last bit is 1, from which rounding to float32 is as from the exact sum.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    # Knuth's TwoSum: `error` is what `total` lacks, exactly.
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    to_odd = (error.abs() > 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return torch.where(to_odd, bits + 2 * away - 1, bits).view(torch.float64).float()


def _scaled_sum(codes: Tensor, weights: Tensor, scales: Tensor, group_size: int, start: int) -> Tensor:
    """f of a part of the inputs that begins at input `start`: M × N."""
    f = torch.zeros(len(codes), len(weights), device=codes.device)
    for group, sums in enumerate(_group_sums(codes, weights, group_size), start // group_size):
        f = fma(sums.float(), scales[:, group].float(), f)
    return f


def _group_sums(codes: Tensor, weights: Tensor, group_size: int | None) -> Iterator[Tensor]:
    """int32 sums of products, M × N, group by group."""
    for group in range(0, codes.shape[1], group_size or codes.shape[1]):
        stop = group + (group_size or codes.shape[1])
        yield _integer_matmul(codes[:, group:stop], weights[:, group:stop])


def _integer_matmul(codes: Tensor, weights: Tensor) -> Tensor:
    """codes · weightsᵀ of int8, exactly, in int32: torch multiplies integer matrices slowly on CPU, on CUDA not at all.

    In float32 the sums of `EXACT_TERMS` products are never rounded, whatever the order.
    """
    wide = _exact_dtype(codes.device)
    total = torch.zeros(len(codes), len(weights), dtype=torch.int32, device=codes.device)
    for start in range(0, codes.shape[1], EXACT_TERMS):
        block = slice(start, start + EXACT_TERMS)
        total += (codes[:, block].to(wide) @ weights[:, block].to(wide).T).to(torch.int32)
    return total


def _exact_dtype(device: torch.device) -> torch.dtype:
    """float32, but float64 on CUDA, where float32 matrices may be multiplied as TF32."""
    return torch.float32 if device.type == "cpu" else torch.float64


def _finished(scaled: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return (scaled if bias is None else scaled + bias.float()).to(out_dtype)
