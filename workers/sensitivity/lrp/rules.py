"""The rules of layer-wise relevance propagation, each as a change of how a gradient passes.

The relevance of an activation x is R = x ⊙ g, g being the gradient that these rules hand back to it. In that form
(modified gradient × activation) residual additions, reshapes and poolings need no rule, and one forward and backward
pass of autograd gives the relevance of everything. Written from the papers:

- ε and γ: Montavon et al., Layer-Wise Relevance Propagation: An Overview (2019), §10.2;
- activations, halves of a product, softmax, norms: Achtibat et al., AttnLRP (2402.05602), §3;
- the detached standard deviation of a norm: Ali et al. (2202.07304), §3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

Pull = Callable[..., Tensor]
"""(gradient of the output, input) → gradient of the input."""

NEAR_ZERO = 1e-3
"""Slopes of an activation are taken between zero and a point at least so far from it."""


def stabilized(z: Tensor, epsilon: float) -> Tensor:
    """The ε-rule: z as it is; its gradient is multiplied by z / (z + ε·sign z).

    After z = Wx + b this makes x ⊙ g equal to R_j = Σ_k x_j w_kj / (z_k + ε·sign z_k) · R_k; b keeps its share.
    """

    def pull(g: Tensor, z: Tensor) -> Tensor:
        return g * (z / away_from_zero(z, epsilon))

    return ruled(_copy, pull, z)


def gamma_rule(
    convolve: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    gamma: float,
    epsilon: float,
) -> Tensor:
    """The γ-rule of a convolution y = convolve(x, weight, bias), followed by the affine map z = scale·y + shift.

    With contributions c_jk = x_j w_kj of the folded map, those of z_k's own sign count (1 + γ)-fold:
    R_j = Σ_k (c_jk + γ·c_jk^±) / Σ_j (c_jk + γ·c_jk^±) · R_k, the bias being one of them. `scale` and `shift` have one
    value per output channel; the gradient that arrives is that of y.
    """
    per_channel = (-1, *[1] * (weight.dim() - 2))

    def boosted(x: Tensor) -> tuple[Tensor, Tensor]:
        w = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        b = (shift if bias is None else shift + scale * bias).view(per_channel)
        z = convolve(x, w) + b
        positive = convolve(x.clamp(min=0), w.clamp(min=0)) + convolve(x.clamp(max=0), w.clamp(max=0)) + b.clamp(min=0)
        return z.detach(), z + gamma * torch.where(z > 0, positive, z - positive)

    def pull(g: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z, denominator = boosted(leaf)
            relevance = z * g / torch.where(scale == 0, 1, scale).view(per_channel)
            (pulled,) = torch.autograd.grad(
                denominator, leaf, relevance / away_from_zero(denominator.detach(), epsilon)
            )
        return pulled

    return ruled(lambda x: convolve(x, weight, bias), pull, x)


def secant(function: Function, x: Tensor) -> Tensor:
    """An elementwise activation: its slope is that of the secant from zero, (f(x) − f(0)) / x.

    Where f(0) = 0 this is f(x)/x, which hands relevance on unchanged; else f(0), which does not depend on x, keeps its
    share as a bias does. A sigmoid's f(x)/x would grow without bound near zero.
    """

    def pull(g: Tensor, x: Tensor) -> Tensor:
        x = torch.where(x.abs() > NEAR_ZERO, x, torch.where(x > 0, NEAR_ZERO, -NEAR_ZERO).to(x))
        return g * ((function(x.clone()) - function(torch.zeros_like(x))) / x)

    return ruled(function, pull, x)


def proportional(function: Function, x: Tensor) -> Tensor:
    """A norm without a mean (RMSNorm): with its root mean square detached, its slope is f(x)/x."""

    def pull(g: Tensor, x: Tensor) -> Tensor:
        return g * torch.where(x == 0, 0, function(x) / torch.where(x == 0, 1, x))

    return ruled(function, pull, x)


def centred(function: Function, x: Tensor, weight: Tensor | None, groups: tuple[int, ...], eps: float) -> Tensor:
    """A norm with a mean (LayerNorm, GroupNorm) whose standard deviation is detached.

    `weight` broadcasts with x; x viewed as `groups` has the elements that share a mean in its last dimension.
    """

    def pull(g: Tensor, x: Tensor) -> Tensor:
        weighted = (g if weight is None else g * weight).reshape(groups)
        deviation = (x.reshape(groups).var(-1, correction=0, keepdim=True) + eps).sqrt()
        return ((weighted - weighted.mean(-1, keepdim=True)) / deviation).view_as(x)

    return ruled(function, pull, x)


def scaled(x: Tensor, factor: float) -> Tensor:
    """A factor of a product: x as it is; its gradient times `factor`, so that the factors share the relevance."""
    return ruled(lambda x: x.view_as(x), lambda g, _x: g * factor, x)


def observed(y: Tensor, visit: Callable[[Tensor], object]) -> Tensor:
    """y as it is; going backwards, `visit(its relevance)`."""

    def pull(g: Tensor, y: Tensor) -> Tensor:
        visit(y * g)
        return g

    return ruled(_copy, pull, y)


def away_from_zero(z: Tensor, epsilon: float) -> Tensor:
    """z + ε·sign z, with sign 0 = 1."""
    return z + torch.where(z < 0, -epsilon, epsilon).to(z)


def ruled(function: Function, pull: Pull, x: Tensor) -> Tensor:
    """function(x), whose gradient is what `pull` says."""
    y: Tensor = _Ruled.apply(x, function, pull)  # type: ignore[no-untyped-call]
    return y


def _copy(x: Tensor) -> Tensor:
    """x, not as a view: models may write over it (+=, ReLU in place), but not over what a rule keeps."""
    return x.clone()


class _Ruled(torch.autograd.Function):
    """x is kept as autograd keeps tensors, so that a checkpointed block computes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Function, pull: Pull) -> Tensor:
        ctx.save_for_backward(x)
        ctx.pull = pull
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return ctx.pull(gradients[0], x), None, None
