"""Where a model's weights lie: on one device, or spread over several, between which accelerate moves what flows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from search.errors import ModelTooLarge

Placement = torch.device | Mapping[str, torch.device] | Literal["auto"]
"""A device; or the device of each part of a model, by its name; or `auto`: all GPUs that this process sees, each with
about as much as the others."""


def devices_of(placement: Placement) -> list[torch.device]:
    """The devices that a model may lie on."""
    if isinstance(placement, torch.device):
        return [placement]
    if isinstance(placement, Mapping):
        return list(dict.fromkeys(placement.values()))
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def place(model: nn.Module, placement: Placement) -> nn.Module:
    """The model, moved. Raises ModelTooLarge where a part of it would not fit on any of several devices."""
    if isinstance(placement, torch.device):
        return model.to(placement)
    from accelerate import dispatch_model

    parts = spread(model) if placement == "auto" else dict(placement)
    skipped = getattr(model, "_skip_keys_device_placement", None)
    placed: nn.Module = dispatch_model(model, parts, skip_keys=skipped, force_hooks=True)
    return placed


def spread(model: nn.Module) -> dict[str, torch.device]:
    """Each part's GPU: in the order of the model, and a block on one."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(getattr(model, "_no_split_modules", None) or [])
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    parts = infer_auto_device_map(model, {**memory, "cpu": 0}, no_split_module_classes=whole)
    left = [name for name, device in parts.items() if not isinstance(device, int)]
    if left:
        raise ModelTooLarge(
            f"{len(left)} parts of the model fit on none of {torch.cuda.device_count()} GPUs, {left[0]} among them",
            field="model",
            accepted="BITFRONTIER_GPUS_PER_EVALUATOR, set to more",
        )
    return {name: torch.device("cuda", device) for name, device in parts.items()}
