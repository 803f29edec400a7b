"""What measuring a configuration gives: numbers of every sample, and the metrics that they come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Samples = dict[str, list[float]]
"""Of every sample: `loss` (divergence from full precision), and `next_token_loss` (nats) or `correct` (0 or 1) where
they exist."""


def metrics(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """`loss` (mean over samples), `loss_stderr` (0 for a single sample, of which nothing is known), and `perplexity` or
    `accuracy` where they exist."""
    losses = np.asarray(samples["loss"], dtype=float)
    stderr = float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else 0.0
    found = {"loss": max(float(losses.mean()), 0.0), "loss_stderr": stderr}
    if "next_token_loss" in samples:
        found["perplexity"] = math.exp(min(float(np.mean(samples["next_token_loss"])), 700.0))
    if "correct" in samples:
        found["accuracy"] = float(np.mean(samples["correct"]))
    return found


def joined(parts: Sequence[Mapping[str, Sequence[float]]]) -> Samples:
    """The samples of several measurements one after the other."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}
