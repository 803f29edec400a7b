"""Which rule an operation gets, whatever module or function calls it.

An operation is on the path when its input depends on what the model is given: parameters, masks and rotary angles do
not. Products of two factors on the path share the relevance by halves: that is a gated MLP, a squeeze-and-excite gate,
and attention, whose query and key thus get a quarter each and whose value gets a half, fused or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from workers.sensitivity.lrp.rules import centred, gamma_rule, observed, proportional, scaled, secant, stabilized

Operation = Callable[..., Any]

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
AFFINE = CONVOLUTIONS | {
    "linear",
    "batch_norm",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "grouped_mm",
}
PRODUCTS = {"mul", "multiply", "rmul", "einsum"}
MATRIX_PRODUCTS = {"matmul", "rmatmul", "mm", "bmm", "mv"}
MATRIX_PRODUCTS_PLUS = {"addmm", "baddbmm"}
DIVISIONS = {"div", "divide", "true_divide", "truediv"}
ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus"),
    *("hardswish", "hardsigmoid", "hardtanh", "tanh", "sigmoid", "softsign", "clamp", "clamp_min", "clip"),
}
RULED_OUT_OF_PLACE = PRODUCTS | DIVISIONS | ACTIVATIONS
PLAIN = {
    # Linear.
    *("add", "radd", "sub", "rsub", "neg", "sum", "mean", "cumsum", "index_add", "scatter_add"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "interpolate", "upsample", "dropout", "dropout1d", "dropout2d", "pad"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "dropout3d", "feature_alpha_dropout"),
    # Only moves, copies or selects.
    *("get", "getitem", "setitem", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "transpose"),
    *("permute", "movedim", "moveaxis", "swapaxes", "swapdims", "squeeze", "unsqueeze", "expand", "expand_as"),
    *("repeat", "repeat_interleave", "tile", "cat", "concat", "stack", "split", "chunk", "tensor_split", "unbind"),
    *("narrow", "select", "index_select", "gather", "take_along_dim", "scatter", "index_put", "index_copy", "roll"),
    *("flip", "where", "masked_fill", "masked_scatter", "tril", "triu", "clone", "contiguous", "to", "float", "half"),
    *("bfloat16", "double", "type", "type_as", "cpu", "cuda", "copy", "unfold", "fold", "pixel_shuffle", "t"),
    *("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "broadcast_to", "requires_grad", "diagonal"),
    # The winner takes all.
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "max", "amax", "min", "amin", "topk", "sort"),
    *("maximum", "minimum"),
    # Its plain gradient is the rule: x ⊙ g = x (R′ − s·ΣR′), s = softmax(x), R′ the relevance of s.
    "softmax",
}
"""Operations whose plain gradient is their rule."""


@dataclass(frozen=True, slots=True)
class Rules:
    """`epsilon` of linear layers and convolutions, `gamma` of a CNN's early convolutions."""

    epsilon: float = 1e-6
    gamma: float = 0.25


@dataclass(frozen=True, slots=True)
class Convolution:
    """How a convolution module is treated: `early`, and the batch norm that follows it and is folded into it."""

    early: bool
    norm: nn.modules.batchnorm._BatchNorm | None = None


class Operations(TorchFunctionMode):
    """Within, every operation passes gradients as its rule says.

    `entry(relevance)` is called with that of every embedding's output. `running` are the modules that run, innermost
    last; `plain` collects the operations without a rule, as "operation in module type".
    """

    def __init__(
        self, rules: Rules, convolutions: dict[nn.Module, Convolution], entry: Callable[[Tensor], object]
    ) -> None:
        super().__init__()
        self.rules = rules
        self.convolutions = convolutions
        self.entry = entry
        self.running: list[nn.Module] = []
        self.plain: set[str] = set()
        self._entered = False

    def around(self, forward: Operation, *args: Any, **kwargs: Any) -> Any:
        """forward(…) under the rules, also where it is called within them."""
        if self._entered:
            return forward(*args, **kwargs)
        self._entered = True
        try:
            with self:
                return forward(*args, **kwargs)
        finally:
            self._entered = False

    def __torch_function__(
        self, function: Operation, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply `function` under its rule."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        name = function.__name__.strip("_")
        if name == "embedding":
            return observed(function(*args, **kwargs).detach().requires_grad_(), self.entry)
        if not any(map(_on_path, _tensors([*args, *kwargs.values()]))):
            return function(*args, **kwargs)
        if function.__name__ == f"{name}_" and name in RULED_OUT_OF_PLACE and _on_path(args[0]):
            # What is written over is still needed to tell its relevance.
            return args[0].copy_(
                self.__torch_function__(getattr(Tensor, name), _types, (args[0].clone(), *args[1:]), kwargs)
            )
        if name in CONVOLUTIONS:
            return self._convolution(function, *args, **kwargs)
        if name in AFFINE:
            return stabilized(function(*args, **kwargs), self.rules.epsilon)
        if name in PRODUCTS:
            return _product(function, args, kwargs)
        if name in MATRIX_PRODUCTS:
            return self._matrix_product(function, args, kwargs)
        if name in MATRIX_PRODUCTS_PLUS:
            return self._matrix_product(function, args[1:3], kwargs, args[0])
        if name == "scaled_dot_product_attention":
            return _attention(function, *args, **kwargs)
        if name in DIVISIONS and _on_path(args[0]):
            return function(args[0], *map(_detached, args[1:]), **kwargs)
        if name in ACTIVATIONS:
            return _activation(function, *args, **kwargs)
        if name in NORMS:
            return NORMS[name](function, *args, **kwargs)
        output = function(*args, **kwargs)
        if name not in PLAIN and any(map(_on_path, _tensors([output]))):
            self.plain.add(f"{name} in {type(self.running[-1]).__name__}" if self.running else name)
        return output

    def _convolution(
        self, function: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **kwargs: Any
    ) -> Tensor:
        treated = self.convolutions.get(self.running[-1]) if self.running else None
        if treated is None or not treated.early or not self.rules.gamma:
            z: Tensor = function(x, weight, bias, *rest, **kwargs)
            return z if treated and treated.norm else stabilized(z, self.rules.epsilon)
        scale, shift = _affine(treated.norm, weight)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y: Tensor = function(x, weight, bias, *rest, **kwargs)
            return y

        return gamma_rule(convolve, x, weight, bias, scale, shift, self.rules.gamma, self.rules.epsilon)

    def _matrix_product(
        self, function: Operation, factors: tuple[Any, ...], kwargs: dict[str, Any], *added: Any
    ) -> Tensor:
        if all(map(_on_path, factors)):
            halves: Tensor = function(*added, *(scaled(factor, 0.5) for factor in factors), **kwargs)
            return halves
        return stabilized(function(*added, *factors, **kwargs), self.rules.epsilon)


def _product(function: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    factors = sum(map(_on_path, _tensors(args)))
    share = 1 / max(factors, 1)

    def shared(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(shared, value))
        return scaled(value, share) if _on_path(value) and share < 1 else value

    return function(*map(shared, args), **kwargs)


def _attention(function: Operation, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """softmax(q·k)·v: two products, one within a factor of the other."""
    outer = 0.5 if _on_path(value) and (_on_path(query) or _on_path(key)) else 1.0
    inner = 0.5 * outer if _on_path(query) and _on_path(key) else outer
    shares = ((query, inner), (key, inner), (value, outer))
    output: Tensor = function(*(scaled(x, share) if _on_path(x) else x for x, share in shares), *rest, **kwargs)
    return output


def _activation(function: Operation, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    def apply(x: Tensor) -> Tensor:
        y: Tensor = function(x, *rest, **kwargs)
        return y

    if kwargs.get("inplace") or any(value is True for value in rest):
        return x.copy_(secant(lambda x: apply(x.clone()), x.clone()))
    return secant(apply, x)


def _layer_norm(
    function: Operation,
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_kwargs: Any,
) -> Tensor:
    groups = (*x.shape[: x.dim() - len(normalized_shape)], -1)
    return centred(lambda x: function(x, normalized_shape, weight, bias, eps), x, weight, groups, eps)


def _group_norm(
    function: Operation,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_kwargs: Any,
) -> Tensor:
    per_channel = None if weight is None else weight.view(-1, *[1] * (x.dim() - 2))
    groups = (x.shape[0], num_groups, -1)
    return centred(lambda x: function(x, num_groups, weight, bias, eps), x, per_channel, groups, eps)


def _proportional(function: Operation, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    return proportional(lambda x: function(x, *rest, **kwargs), x)


NORMS: dict[str, Operation] = {
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _proportional,
    "normalize": _proportional,
}


def _affine(norm: nn.modules.batchnorm._BatchNorm | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel of a batch norm in evaluation mode; 1 and 0 without one."""
    if norm is None:
        return weight.new_ones(len(weight)), weight.new_zeros(len(weight))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _on_path(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
