"""The loss of a search: how far the model's output has moved from its own full-precision output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from search.inventory import Task

CACHED = 2**20
"""Numbers of the output that are compared at once: what stays in a processor's cache takes a quarter of the time."""


def divergence(task: Task, output: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Loss of every sample of a batch, shape (samples,), 0 when `output` equals `reference`.

    Classification: KL(reference ‖ output) in nats, of logits samples × classes. Causal language models: its mean over
    the positions that `mask` keeps, of logits samples × positions × vocabulary. Embeddings: 1 − cosine of samples ×
    features.
    """
    # Both are written as sums of terms of second order: in the textbook forms terms of first order cancel, and what
    # float32 leaves of them is greater than the loss of one layer at 8 bits.
    if task == "embedding":
        return (F.normalize(output.float(), dim=-1) - F.normalize(reference.float(), dim=-1)).square().sum(-1) / 2
    pairs = zip(_rows(output), _rows(reference), strict=True)
    kl = torch.cat([_kl(*pair) for pair in pairs]).view(output.shape[:-1])
    return masked_mean(kl, mask) if kl.dim() == 2 else kl


def _rows(logits: Tensor) -> tuple[Tensor, ...]:
    """Rows of logits, as many together as stay in a processor's cache; views."""
    return torch.split(logits.flatten(0, -2), max(1, CACHED // logits.shape[-1]))


def _kl(output: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ output) of each row of logits."""
    log_q, log_p = output.float().log_softmax(-1), reference.float().log_softmax(-1)
    p = log_p.exp()
    return (log_q.exp() - p - p * (log_q - log_p)).sum(-1)


def gradient(task: Task, output: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gradient of each sample's `divergence` with respect to the output. Shaped as `output`.

    KL: q − p at every position, over the number of positions. Autograd finds the same, and keeps five tensors of the
    output's size until then.
    """
    if task == "embedding":
        u = F.normalize(output.float(), dim=-1)
        away = u - F.normalize(reference.float(), dim=-1)
        length: Tensor = output.float().norm(dim=-1, keepdim=True)
        return ((away - u * away.square().sum(-1, keepdim=True) / 2) / length).to(output)
    moved = output.float().softmax(-1)
    for part, other in zip(_rows(moved), _rows(reference), strict=True):
        part -= other.float().softmax(-1)
    if moved.dim() == 3:
        moved *= _position_weights(moved, mask)
    return moved.to(output)


def curvature(task: Task, output: Tensor, change: Tensor, mask: Tensor | None = None) -> Tensor:
    """H·change, H being the Hessian of each sample's `divergence` from `output` with respect to the output, there.

    KL: (diag p − ppᵀ)·change at every position, over the number of positions; cosine: (I − uuᵀ)·change / ‖output‖², u
    being the direction of the output. Shaped as `output`.
    """
    if task == "embedding":
        output = output.float()
        u = F.normalize(output, dim=-1)
        return (change - u * (u * change).sum(-1, keepdim=True)) / output.square().sum(-1, keepdim=True)
    p = output.float().softmax(-1)
    product = p * (change - (p * change).sum(-1, keepdim=True))
    if product.dim() == 2:
        return product
    return product * _position_weights(product, mask)


def score(task: Task, output: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """A random gradient c of the output whose outer product is, on average, the Hessian of the batch's mean divergence.

    Of every position a label is drawn from the model and c is the gradient of its log-likelihood, with a random sign,
    times the root of the position's weight in the mean: E[c cᵀ] = diag p − ppᵀ, and what differs in position or sample
    is uncorrelated. An embedding's label is drawn on the sphere around its direction. Shaped as `output`; float32.
    """
    if task == "embedding":
        noise = torch.randint(0, 2, output.shape, generator=generator, device=output.device).float() * 2 - 1
        u = F.normalize(output.float(), dim=-1)
        noise -= u * (u * noise).sum(-1, keepdim=True)
        length: Tensor = output.float().norm(dim=-1, keepdim=True)
        drawn: Tensor = noise / length / len(output) ** 0.5
        return drawn
    p = output.float().softmax(-1)
    flat = p.view(-1, p.shape[-1])
    parts = torch.split(flat, max(1, CACHED // flat.shape[-1]))
    # Where the output is not finite any label will do, and the score is not finite either: to draw is what would fail.
    labels = torch.cat([torch.multinomial(part.nan_to_num(1.0), 1, generator=generator) for part in parts])
    c = flat.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=flat.dtype)).view_as(p)
    signs = torch.randint(0, 2, c.shape[:-1], generator=generator, device=c.device).to(c) * 2 - 1
    if c.dim() == 3:
        kept = torch.ones_like(signs) if mask is None else mask.to(signs)
        signs *= (kept / kept.sum(-1, keepdim=True).clamp_min(1)).sqrt()
    return c.mul_((signs / len(output) ** 0.5).unsqueeze(-1))


def has_labels(task: Task, batch: Mapping[str, Tensor]) -> bool:
    """Whether `labelled_loss` can be asked for: a text's next tokens are its labels, an embedding has none."""
    return task == "causal-lm" or (task != "embedding" and "labels" in batch)


def labelled_loss(task: Task, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of every sample against its labels, in nats: a text's next tokens, an image's or sequence's class."""
    if task == "causal-lm":
        return next_token_loss(output, batch["input_ids"], batch["attention_mask"])
    return F.cross_entropy(output.float(), batch["labels"], reduction="none")


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of each sequence's next tokens; shape (samples,)."""
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return masked_mean(losses.view(len(tokens), -1), mask[:, 1:])


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the last dimension of the positions that `mask` keeps."""
    weights = torch.ones_like(values) if mask is None else mask.to(values)
    return (values * weights).sum(-1) / weights.sum(-1).clamp_min(1)


def _position_weights(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Of every position in its sample's mean, samples × positions × 1."""
    weights = torch.ones_like(logits[..., 0]) if mask is None else mask.to(logits)
    return (weights / weights.sum(-1, keepdim=True).clamp_min(1)).unsqueeze(-1)
