"""Dynamic activation quantisation: symmetric, one scale per token, chosen as the activation arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def round_activation(x: Tensor, bits: int, token_dims: int = 1) -> Tensor:
    """Round to 2·(2^(b−1) − 1) + 1 levels, the scale being each token's greatest magnitude / (2^(b−1) − 1).

    A token is what the last `token_dims` dimensions span: 1 for … × features, all but the first for images. Bits are
    8, 6 or 4. Going backwards, gradients pass as if nothing had been rounded (the straight-through estimator).
    """
    rounded: Tensor = _Rounded.apply(x, bits, token_dims)  # type: ignore[no-untyped-call]
    return rounded


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, bits: int, token_dims: int) -> Tensor:
        return _round(x, bits, token_dims)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _round(x: Tensor, bits: int, token_dims: int) -> Tensor:
    dims = tuple(range(-token_dims, 0))
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dims, keepdim=True).clamp_min(1e-12) / most
    rounded: Tensor = (x / scale).round().clamp(-most, most) * scale
    return rounded
