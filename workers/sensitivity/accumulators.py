"""Room to add up what is found of each layer's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def zeros_for(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 zeros, shaped as each of the weights and on its device.

    They are one piece of memory a device, taken when it is first written to, and given back whole: many small ones
    would leave gaps between what comes and goes.
    """
    pieces: dict[str, Tensor] = {}
    for device in dict.fromkeys(weight.device for weight in weights.values()):
        here = {name: weight for name, weight in weights.items() if weight.device == device}
        sizes = [weight.numel() for weight in here.values()]
        parts = torch.split(torch.zeros(sum(sizes), device=device), sizes)
        pieces |= {name: part.view(weight.shape) for (name, weight), part in zip(here.items(), parts, strict=True)}
    return pieces
