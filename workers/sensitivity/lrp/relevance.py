"""The relevance of every layer's output, of one sample: one forward and one backward pass under the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from search.inventory import Task
from workers.calibration import Batch
from workers.evaluator import Evaluator
from workers.layers import CONVOLUTIONS
from workers.loss import masked_mean
from workers.sensitivity.backward import recomputing
from workers.sensitivity.lrp.operations import Convolution, Operations, Rules
from workers.sensitivity.lrp.propagation import convolutions, ruled_by
from workers.sensitivity.lrp.rules import observed

RULES = Rules()


@dataclass(slots=True)
class Relevance:
    """What one sample's answer owes to each layer: Σ|R| over all that the layer gives.

    `entering` is ΣR of the pixels or embeddings, `answer` what was explained, `plain` the operations without a rule.
    """

    layers: dict[str, float]
    entering: float = 0.0
    answer: float = 0.0
    plain: set[str] = field(default_factory=set)

    def left(self, layer: str, relevance: Tensor) -> None:
        """Add the relevance of what one use of a layer gave."""
        self.layers[layer] += float(relevance.abs().sum(dtype=torch.float64))

    def entered(self, relevance: Tensor) -> None:
        """Add the relevance of pixels, or of what an embedding gave."""
        self.entering += float(relevance.sum(dtype=torch.float64))


def treatments(evaluator: Evaluator, batch: Batch) -> dict[nn.Module, Convolution]:
    """How the model's convolutions are treated; found by running it, where it has any."""
    model = evaluator.loaded.model
    if not any(isinstance(module, CONVOLUTIONS) for module in model.modules()):
        return {}
    return convolutions(model, lambda: evaluator.loaded(batch))


def propagate(
    evaluator: Evaluator, layers: list[str], batch: Batch, treated: dict[nn.Module, Convolution], rules: Rules = RULES
) -> Relevance:
    """The relevance of `layers` for the one sample in `batch`, at the present allocation.

    Fused experts have no outputs of their own: what they give together counts for each of their weights. A convolution
    with a batch norm folded into it gives what the batch norm gives.
    """
    found = Relevance(dict.fromkeys(layers, 0.0))
    operations = Operations(rules, treated, found.entered)
    chain = evaluator.chain
    with ExitStack() as stack:
        for name in layers:
            for module in evaluator.modules(name):
                stack.enter_context(_observed(_last(module, treated), partial(found.left, name)))
        stack.enter_context(ruled_by(operations, evaluator.loaded.model, chain.blocks if chain else ()))
        stack.enter_context(recomputing(evaluator))
        if "pixel_values" in batch:
            pixels = batch["pixel_values"].detach().clone().requires_grad_()
            batch = batch | {"pixel_values": observed(pixels, found.entered)}
        explained = answer(evaluator.loaded.task, evaluator.loaded(batch), batch.get("attention_mask")).sum()
        torch.autograd.backward(explained)
    found.answer = float(explained.detach())
    found.plain = operations.plain
    return found


def answer(task: Task, output: Tensor, mask: Tensor | None) -> Tensor:
    """What is explained of every sample, shape (samples,): the predicted class's logit; the greatest logit, averaged
    over the positions that `mask` keeps; an embedding's projection on its own direction."""
    if task == "embedding":
        return (output * F.normalize(output.detach(), dim=-1)).sum(-1)
    greatest = output.amax(-1)
    return masked_mean(greatest, mask) if greatest.dim() == 2 else greatest


def _last(module: nn.Module, treated: dict[nn.Module, Convolution]) -> nn.Module:
    return (module in treated and treated[module].norm) or module


@contextmanager
def _observed(module: nn.Module, visit: Callable[[Tensor], None]) -> Iterator[None]:
    def leave(_module: nn.Module, _inputs: object, output: Any) -> Tensor | None:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return None
        return observed(output if output.requires_grad else output.detach().requires_grad_(), visit)

    hook = module.register_forward_hook(leave)
    try:
        yield
    finally:
        hook.remove()
