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
    if task == "embedding":
        return 1 - F.cosine_similarity(output, reference, dim=-1)
    log_q, log_p = output.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return masked_mean(kl, mask) if kl.dim() == 2 else kl


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of each sequence's next tokens; shape (samples,)."""
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return masked_mean(losses.view(len(tokens), -1), mask[:, 1:])


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the last dimension of the positions that `mask` keeps."""
    weights = torch.ones_like(values) if mask is None else mask.to(values)
    return (values * weights).sum(-1) / weights.sum(-1).clamp_min(1)
