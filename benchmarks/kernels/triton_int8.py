"""The rival in Triton: int8 × int8 with a scale for each token and channel, to float16. Import it where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

Config = tuple[int, int, int, int, int]
"""Tokens, rows and inputs of a tile; warps; stages."""

_FEW: tuple[Config, ...] = ((16, 32, 256, 4, 5), (16, 64, 256, 4, 4), (16, 32, 512, 4, 3), (16, 128, 128, 4, 5))
_SOME: tuple[Config, ...] = ((64, 32, 256, 4, 4), (64, 64, 128, 4, 5), (64, 128, 128, 4, 4))
_MANY: tuple[Config, ...] = (
    (128, 128, 128, 8, 4),
    (128, 256, 128, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 128, 8, 3),
    (128, 128, 128, 4, 4),
)


def configs(tokens: int) -> tuple[Config, ...]:
    """What is tried for so many tokens."""
    return _FEW if tokens <= 16 else _SOME if tokens <= 128 else _MANY


def product(codes: Tensor, weights: Tensor, token_scales: Tensor, scales: Tensor, config: Config) -> Tensor:
    """codes (M × K) · weightsᵀ (N × K), scaled, in float16; K is a multiple of the tile's inputs."""
    (tokens, inputs), rows = codes.shape, len(weights)
    tile_tokens, tile_rows, tile_inputs, warps, stages = config
    assert inputs % tile_inputs == 0
    output = torch.empty(tokens, rows, dtype=torch.float16, device=codes.device)
    grid = (triton.cdiv(tokens, tile_tokens) * triton.cdiv(rows, tile_rows),)
    _product[grid](
        codes,
        weights,
        token_scales,
        scales,
        output,
        tokens,
        rows,
        inputs,
        TOKENS=tile_tokens,
        ROWS=tile_rows,
        INPUTS=tile_inputs,
        num_warps=warps,
        num_stages=stages,
    )
    return output


@triton.jit
def _product(
    codes,
    weights,
    token_scales,
    scales,
    output,
    tokens,
    rows,
    inputs,
    TOKENS: tl.constexpr,  # noqa: N803 -- a constant of the kernel
    ROWS: tl.constexpr,  # noqa: N803 -- a constant of the kernel
    INPUTS: tl.constexpr,  # noqa: N803 -- a constant of the kernel
):
    # Bands of 8 tiles of tokens, so that what runs at one time shares its loads in L2.
    across, down = tl.cdiv(tokens, TOKENS), tl.cdiv(rows, ROWS)
    band = tl.program_id(0) // (8 * down)
    width = min(across - band * 8, 8)
    within = tl.program_id(0) % (8 * down)
    token = (band * 8 + within % width) * TOKENS + tl.arange(0, TOKENS)
    row = within // width * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, INPUTS)
    # Past the end they read what is there; it is not stored.
    left = codes + (token % tokens).to(tl.int64)[:, None] * inputs + k[None, :]
    right = weights + (row % rows).to(tl.int64)[None, :] * inputs + k[:, None]
    sums = tl.zeros((TOKENS, ROWS), dtype=tl.int32)
    for _ in range(0, inputs, INPUTS):
        sums = tl.dot(tl.load(left), tl.load(right), sums, out_dtype=tl.int32)
        left += INPUTS
        right += INPUTS
    within_tokens, within_rows = token < tokens, row < rows
    scaled = sums.to(tl.float32) * tl.load(token_scales + token, mask=within_tokens)[:, None]
    scaled *= tl.load(scales + row, mask=within_rows)[None, :]
    place = output + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(place, scaled.to(tl.float16), mask=within_tokens[:, None] & within_rows[None, :])
