"""Temporary changes to how a module runs; afterwards it is as before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, calling `module` is calling `forward`."""
    own = vars(module).get("forward")
    try:
        module.forward = forward
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks afterwards."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
