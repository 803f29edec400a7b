"""Backward passes that hand each layer's gradients over as they reach it, and keep none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search.inventory import by_whole
from workers.calibration import Batch, sample_count
from workers.evaluator import Evaluator, by_position
from workers.hooks import removing
from workers.layers import WeightedLayer

LARGE = 2**28
"""Models with more bytes of parameters than this are differentiated one sample at a time, and their blocks'
activations are computed again when the backward pass reaches them."""

HALF_SCALE = 2.0**10
"""What a float16 model's gradients are multiplied by on their way back: below 6e-8 float16 has no numbers."""

OnWeight = Callable[[str, Tensor], None]
"""(layer or part, gradient shaped as its weight), once a backward pass, summed over all uses of the weight."""

OnUse = Callable[[str, Tensor, Tensor], None]
"""(layer, its input, gradient of the input or the output), once for each use of the layer."""


@contextmanager
def visiting(
    evaluator: Evaluator,
    layers: Iterable[str],
    *,
    weight: OnWeight | None = None,
    entered: OnUse | None = None,
    left: OnUse | None = None,
) -> Iterator[None]:
    """Within, a backward pass through the model calls `weight` with the gradient of each of `layers`' weights,
    `entered` with its input, before a scheme rounds it, and the gradient through this layer alone, `left` with that of
    its output.

    Fused experts have no input and output of their own: of them only the weight is visited. Of parts of layers, too,
    `weight` is called for each, and the others with the whole layer.
    """
    with ExitStack() as stack:
        for whole, names in by_whole(layers).items():
            layer = evaluator.layers[whole]
            if weight is not None:
                visit = partial(_each_visited, [evaluator.layers[name] for name in names], weight)
                stack.enter_context(_weight_visited(layer.parameter, visit))
            if layer.layer.kind != "experts" and (entered or left):
                for module in evaluator.modules(whole):
                    stack.enter_context(_uses_visited(module, whole, entered, left))
        stack.enter_context(recomputing(evaluator))
        yield


def micro_batches(
    evaluator: Evaluator, index: int, start: int = 0, stop: int | None = None, at_once: int | None = None
) -> Iterator[tuple[Batch, slice]]:
    """Samples `start` to `stop` of calibration batch `index`, at most `at_once` together, and where they stand in it;
    one by one where the model is large."""
    batch = evaluator.batches("calibration")[index]
    count = sample_count(batch)
    size = 1 if is_large(evaluator) else at_once or count
    stop = min(count if stop is None else stop, count)
    for low in range(start, stop, size):
        chosen = slice(low, min(low + size, stop))
        yield {key: value[chosen] for key, value in batch.items()}, chosen


def micro_batches_of_split(
    evaluator: Evaluator, start: int, stop: int, at_once: int | None = None
) -> Iterator[tuple[Batch, int, slice]]:
    """Samples `start` to `stop` of all calibration samples, cut as `micro_batches` does, with their batch's index and
    where they stand in it."""
    first = 0
    for index, batch in enumerate(evaluator.batches("calibration")):
        count = sample_count(batch)
        low, high = max(start - first, 0), max(min(stop - first, count), 0)
        for part, chosen in micro_batches(evaluator, index, low, high, at_once):
            yield part, index, chosen
        first += count


def shards(samples: int, most: int) -> list[tuple[int, int]]:
    """At most so many contiguous shards of about equal size: the first sample of each, and the one after its last."""
    cuts = np.linspace(0, samples, min(most, samples) + 1).round().astype(int).tolist()
    return list(pairwise(cuts))


def recomputing(evaluator: Evaluator) -> AbstractContextManager[None]:
    """Within, a backward pass through a large model computes its blocks' activations again."""
    return evaluator.chain.checkpointed() if evaluator.chain is not None and is_large(evaluator) else nullcontext()


def is_large(evaluator: Evaluator) -> bool:
    """Whether the model's parameters outweigh what its activations may take."""
    return sum(p.numel() * p.element_size() for p in evaluator.loaded.model.parameters()) > LARGE


def gradient_scale(evaluator: Evaluator) -> float:
    """What to begin a backward pass with so much of, and divide all gradients by."""
    return HALF_SCALE if next(evaluator.loaded.model.parameters()).dtype == torch.float16 else 1.0


def _each_visited(layers: list[WeightedLayer], visit: OnWeight, gradient: Tensor) -> None:
    for layer in layers:
        visit(layer.layer.name, layer.of(gradient))


@contextmanager
def _weight_visited(parameter: nn.Parameter, visit: Callable[[Tensor], None]) -> Iterator[None]:
    def take(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            visit(gradient)

    parameter.requires_grad_(True)
    hook = parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hook.remove()
        parameter.requires_grad_(False)
        parameter.grad = None


@contextmanager
def _uses_visited(module: nn.Module, name: str, entered: OnUse | None, left: OnUse | None) -> Iterator[None]:
    def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = inputs[0]
        if entered is None or not x.is_floating_point():
            return None
        if not x.requires_grad and torch.is_grad_enabled():
            x = x.detach().requires_grad_()
        return (_visited(x, x, partial(entered, name)), *inputs[1:])

    def leave(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if left is None or not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        # A copy: what follows may change it in place.
        return _visited(output, inputs[0], partial(left, name)).clone()

    # First of all, as what is given by name stands in its place: the evaluator's own hook rounds what is entered.
    hooks = [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_pre_hook(by_position(module), prepend=True, with_kwargs=True),
        module.register_forward_hook(leave),
    ]
    with removing(hooks):
        yield


def _visited(y: Tensor, x: Tensor, visit: Callable[[Tensor, Tensor], None]) -> Tensor:
    visited: Tensor = _Visited.apply(y, x, visit)  # type: ignore[no-untyped-call]
    return visited


class _Visited(torch.autograd.Function):
    """`y` as it is; going backwards, `visit(x, gradient of y)`.

    x is kept as autograd keeps tensors, so that a checkpointed block computes it again.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, visit: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.visit = visit
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.visit(x, gradients[0])
        return gradients[0], None, None
