"""A candidate: an allocation with what is predicted, what it costs and, once measured, how good it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Source = Literal["uniform", "ilp", "refined", "evolved"]
"""Who proposed a configuration: nobody had to, the integer program, the refinement loop, or evolution."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration of a search; `number` is its permalink within the search.

    `allocation` maps layer names to scheme texts. `predicted` holds a loss per metric, `costs` a total per resource
    (`size_bytes`, `avg_bits`, `bitops`, `latency_us`). `expected` is what all measurements before its own let expect of
    the loss on held-out data: `loss`, and the ends `low` and `high` of its 90 % interval; empty where nothing was
    measured before.

    `metrics` is empty until measured. `calibration_loss` is that on the data that was searched (an estimate where the
    configuration lost its race, see `calibration_share`), `acceptance_loss` that on the data that decides what is
    believed. Those that are reported have `loss` (divergence from full precision on the held-out split), `loss_stderr`,
    and `perplexity` or `accuracy` where they exist; while the search runs, `loss` is the calibration loss.

    `fits` says whether every budget holds; `on_frontier` whether it fits and no other fitting candidate dominates it.
    `shadow_prices` says, of each bounded resource in its own units, by how much the logarithm of the predicted loss
    falls for one more unit of it: dx more save a share 1 − exp(−price·dx) of the loss.
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
    expected: dict[str, float] = field(default_factory=dict)
    shadow_prices: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The measured loss; None until measured, and where it is not reported."""
        return self.metrics.get("loss")
