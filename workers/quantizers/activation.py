"""Dynamic activation quantisation: symmetric, one scale per token, chosen as the activation arrives."""

from __future__ import annotations

from torch import Tensor


def round_activation(x: Tensor, bits: int, token_dims: int = 1) -> Tensor:
    """Round to 2·(2^(b−1) − 1) + 1 levels, the scale being each token's greatest magnitude / (2^(b−1) − 1).

    A token is what the last `token_dims` dimensions span: 1 for … × features, all but the first for images. Bits are
    8, 6 or 4.
    """
    dims = tuple(range(-token_dims, 0))
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dims, keepdim=True).clamp_min(1e-12) / most
    rounded: Tensor = (x / scale).round().clamp(-most, most) * scale
    return rounded
