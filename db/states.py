"""The states of a search, and its stages in order. Without the tables, so that a client need not load them."""

from __future__ import annotations

from typing import Literal

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Stage = Literal["profile", "sensitivity", "baselines", "optimize", "measure", "refine", "evolve", "accept"]
