"""A model on the straight path from full precision to a scheme: weights W + t·(Q(W) − W), inputs x + t·(Q(x) − x)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from search.inventory import by_whole
from search.scheme import Scheme
from workers.evaluator import Evaluator, rounds_input, token_dims
from workers.hooks import removing
from workers.quantizers.activation import round_activation
from workers.sensitivity.backward import recomputing

OnWeight = Callable[[str, Tensor], None]
"""(layer or part, gradient at the point, shaped as its weight), for each use of the weight."""

OnInput = Callable[[str, Tensor, Tensor], None]
"""(layer, gradient at the point, Q(x) − x), both shaped as the layer's input, for each use of the layer."""


class Path:
    """Some layers, or parts of them, on their way from full precision (t = 0) to a scheme (t = 1); all else stays.

    A layer's weight at `t` is made when its module runs, and lives for as long as a backward pass needs it. Between
    passes t may be set to any number. The evaluator stays at full precision.
    """

    def __init__(self, evaluator: Evaluator, layers: list[str], scheme: Scheme) -> None:
        self.t = 0.0
        self.scheme = scheme
        self._evaluator = evaluator
        self._movers = by_whole(layers)

    @contextmanager
    def walked(self, weight: OnWeight, activation: OnInput) -> Iterator[None]:
        """Within, the model runs at the point `t`, and a backward pass visits every use of a layer's weight and input.

        The backward pass belongs to the point of the forward pass before it. Gradients pass a rounded input as if it
        had not been rounded.
        """
        # Points on the path are computed, not leaves: this is what autograd follows them back to.
        anchor = torch.zeros((), device=self._evaluator.loaded.device, requires_grad=True)
        with ExitStack() as stack:
            for name in self._movers:
                for module in self._evaluator.modules(name):
                    stack.enter_context(self._moved(name, module, anchor, weight, activation))
            stack.enter_context(recomputing(self._evaluator))
            yield

    def _point(self, name: str) -> Tensor:
        far = self._evaluator.assembled(name, dict.fromkeys(self._movers[name], self.scheme))
        return far.lerp_(self._evaluator.layers[name].weight, 1 - self.t)

    def _visit(self, name: str, weight: OnWeight, gradient: Tensor) -> None:
        for mover in self._movers[name]:
            weight(mover, self._evaluator.layers[mover].of(gradient))

    @contextmanager
    def _moved(
        self, name: str, module: nn.Module, anchor: Tensor, weight: OnWeight, activation: OnInput
    ) -> Iterator[None]:
        layer = self._evaluator.layers[name]
        attribute = name.rpartition(".")[2] if layer.layer.kind == "experts" else "weight"
        moves_input = self.scheme.quantizes_activations and rounds_input(module)

        def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # An attribute of the instance is found before the parameter of that name.
            point, visit = partial(self._point, name), partial(self._visit, name, weight)
            vars(module)[attribute] = _Weight.apply(anchor, point, visit)  # type: ignore[no-untyped-call]
            if not moves_input:
                return None
            x, bits = inputs[0], self.scheme.activation_bits
            rounded = partial(round_activation, bits=bits, token_dims=token_dims(module, x))
            moved = _Input.apply(anchor, x, rounded, self.t, partial(activation, name))  # type: ignore[no-untyped-call]
            return (moved, *inputs[1:])

        def leave(*_: object) -> None:
            vars(module).pop(attribute, None)

        # Computing a checkpointed block again stops, by an exception, inside the last module that is needed.
        hooks = [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]
        try:
            with removing(hooks):
                yield
        finally:
            leave()


class _Weight(torch.autograd.Function):
    """A weight on the path; going backwards, `visit(its gradient)`."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, point: Callable[[], Tensor], visit: Callable[[Tensor], None]) -> Tensor:
        ctx.visit = visit
        return point()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        with torch.no_grad():
            ctx.visit(gradients[0])
        return None, None, None


class _Input(torch.autograd.Function):
    """An input on the path; going backwards, `visit(its gradient, Q(x) − x)`.

    x is kept as autograd keeps tensors, so that a checkpointed block computes it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        _anchor: Tensor,
        x: Tensor,
        rounded: Callable[[Tensor], Tensor],
        t: float,
        visit: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rounded, ctx.visit = rounded, visit
        return x.lerp(rounded(x), t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.visit(gradients[0], ctx.rounded(x) - x)
        return None, gradients[0], None, None, None
