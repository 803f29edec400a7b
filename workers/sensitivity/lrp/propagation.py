"""Relevance of one model run: the rules are attached from outside and taken off again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.hooks import forward_replaced, removing
from workers.layers import CONVOLUTIONS
from workers.sensitivity.lrp.operations import Convolution, Operations
from workers.sensitivity.lrp.rules import Function, proportional, secant

NORM = re.compile(r"RMSNorm$|^T5LayerNorm$")
ACTIVATION = re.compile(r"(GELU|SiLU|Swish|Mish)$")
"""Names of module classes that spell out in operations what is one function."""


@contextmanager
def ruled_by(operations: Operations, model: nn.Module, parts: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Within, `model` runs under the rules of `operations`.

    So do `parts`, its modules that a backward pass may run again by themselves.
    """
    with ExitStack() as stack:
        for module in model.modules():
            rule = _rule(module)
            if rule is not None:
                stack.enter_context(forward_replaced(module, partial(_of_one_input, rule, module.forward)))
            stack.enter_context(_announced(module, operations.running))
        for module in (model, *parts):
            stack.enter_context(forward_replaced(module, partial(operations.around, module.forward)))
        yield


def convolutions(model: nn.Module, run: Callable[[], object]) -> dict[nn.Module, Convolution]:
    """How each convolution that runs is treated: the first half of a network's are early, and a batch norm that takes
    a convolution's very output is folded into it. `run` runs the model once."""
    modules: list[nn.Module] = []
    outputs: list[Tensor] = []
    norms: dict[nn.Module, nn.modules.batchnorm._BatchNorm] = {}

    def convolved(module: nn.Module, _inputs: object, output: Tensor) -> None:
        modules.append(module)
        outputs.append(output)

    def normed(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for convolution, output in zip(modules, outputs, strict=True):
            if output is inputs[0]:
                assert isinstance(module, nn.modules.batchnorm._BatchNorm)
                norms[convolution] = module

    hooks = [
        module.register_forward_hook(convolved) for module in model.modules() if isinstance(module, CONVOLUTIONS)
    ] + [
        module.register_forward_pre_hook(normed)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    with removing(hooks), torch.no_grad():
        run()
    ordered = list(dict.fromkeys(modules))
    return {module: Convolution(place < len(ordered) // 2, norms.get(module)) for place, module in enumerate(ordered)}


def _of_one_input(
    rule: Callable[[Function, Tensor], Tensor], forward: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """The rule, or, where there are further inputs (a gated norm), the rules of the operations within."""
    return rule(forward, args[0]) if len(args) == 1 and not kwargs else forward(*args, **kwargs)


def _rule(module: nn.Module) -> Callable[[Function, Tensor], Tensor] | None:
    name = type(module).__name__
    if NORM.search(name):
        return proportional
    if ACTIVATION.search(name) or type(module).__module__ == "transformers.activations":
        return secant
    return None


@contextmanager
def _announced(module: nn.Module, running: list[nn.Module]) -> Iterator[None]:
    """Within, `module` is the last of `running` while it runs."""

    def enter(*_: object) -> None:
        running.append(module)

    def leave(*_: object) -> None:
        running.pop()

    hooks = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]
    with removing(hooks):
        yield
