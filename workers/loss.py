"""The loss of a search: how far the model's output has moved from its own full-precision output."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from search.inventory import Task


def divergence(task: Task, output: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Loss of every sample of a batch, shape (samples,), 0 when `output` equals `reference`.

    Classification: KL(reference ‖ output) in nats, of logits samples × classes. Causal language models: its mean over
    the positions that `mask` keeps, of logits samples × positions × vocabulary. Embeddings: 1 − cosine of samples ×
    features.
    """
    # Both are written as sums of terms of second order: in the textbook forms terms of first order cancel, and what
    # float32 leaves of them is greater than the loss of one layer at 8 bits.
    if task == "embedding":
        return (F.normalize(output, dim=-1) - F.normalize(reference, dim=-1)).square().sum(-1) / 2
    log_q, log_p = output.float().log_softmax(-1), reference.float().log_softmax(-1)
    p = log_p.exp()
    kl = (log_q.exp() - p - p * (log_q - log_p)).sum(-1)
    return masked_mean(kl, mask) if kl.dim() == 2 else kl


def curvature(task: Task, output: Tensor, change: Tensor, mask: Tensor | None = None) -> Tensor:
    """H·change, H being the Hessian of each sample's `divergence` from `output` with respect to the output, there.

    KL: (diag p − ppᵀ)·change at every position, over the number of positions; cosine: (I − uuᵀ)·change / ‖output‖², u
    being the direction of the output. Shaped as `output`.
    """
    if task == "embedding":
        u = F.normalize(output, dim=-1)
        return (change - u * (u * change).sum(-1, keepdim=True)) / output.square().sum(-1, keepdim=True)
    p = output.float().softmax(-1)
    product = p * (change - (p * change).sum(-1, keepdim=True))
    if product.dim() == 2:
        return product
    weights = torch.ones_like(product[..., 0]) if mask is None else mask.to(product)
    return product * (weights / weights.sum(-1, keepdim=True).clamp_min(1)).unsqueeze(-1)


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of each sequence's next tokens; shape (samples,)."""
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return masked_mean(losses.view(len(tokens), -1), mask[:, 1:])


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the last dimension of the positions that `mask` keeps."""
    weights = torch.ones_like(values) if mask is None else mask.to(values)
    return (values * weights).sum(-1) / weights.sum(-1).clamp_min(1)
