"""A candidate: an allocation with what is predicted, what it costs and, once measured, how good it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Source = Literal["uniform", "ilp"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration of a search; `number` is its permalink within the search.

    `allocation` maps layer names to scheme texts. `predicted` holds a loss per metric, `costs` a total per resource
    (`size_bytes`, `avg_bits`, `bitops`). `metrics` is empty until measured, then has `loss` (divergence from full
    precision on the held-out split), `loss_stderr`, and `perplexity` or `accuracy` where they exist. `fits` says
    whether every budget holds; `on_frontier` whether it fits and no other fitting candidate dominates it.
    """

    number: int
    source: Source
    label: str
    allocation: dict[str, str]
    predicted: dict[str, float]
    costs: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    fits: bool = False
    on_frontier: bool = False

    @property
    def loss(self) -> float | None:
        """The measured loss; None until measured."""
        return self.metrics.get("loss")
