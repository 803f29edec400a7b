"""How resources and budgets are named and written for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ResourceText:
    """A resource's words: `title` of an axis, `short` name, `unit`, `scale` (shown = stored ÷ scale) and `digits`."""

    title: str
    short: str
    phrase: str
    unit: str
    scale: float
    digits: int

    def text(self, stored: float) -> str:
        """A stored amount with its unit."""
        return f"{self.number(stored)} {self.unit}"

    def number(self, stored: float) -> str:
        """A stored amount in the shown unit, without it; two decimals more where one digit would be left of it."""
        shown = stored / self.scale
        digits = self.digits if shown >= 10.0 ** (1 - self.digits) else self.digits + 2
        return f"{shown:,.{digits}f}"


RESOURCES = {
    "avg_bits": ResourceText("Average bits per weight", "Bits per weight", "bits", "bits", 1.0, 2),
    "size_bytes": ResourceText("Model size, MB", "Size", "size", "MB", 1e6, 1),
    "bitops": ResourceText(
        "Bit operations per token or image, 10⁹", "Bit operations", "bit operations", "Gbitops", 1e9, 2
    ),
    "latency_us": ResourceText("Latency of the layers, ms", "Latency", "milliseconds", "ms", 1e3, 2),
}

OBJECTIVES = {
    "loss": "is the best that fits",
    "size_mb": "is the smallest that fits",
    "avg_bits": "has the fewest bits of those that fit",
    "gbitops": "has the fewest bit operations of those that fit",
    "latency_ms": "is the fastest that fits",
}
"""What is said of the best point, by what it has least of."""


def budget_text(name: str, value: float) -> str:
    """`avg_bits ≤ 4.25` in words."""
    words = {
        "avg_bits": "{} bits per weight",
        "size_mb": "{} MB",
        "gbitops": "{} Gbitops",
        "latency_ms": "{} ms",
        "loss_increase": "loss {}",
    }
    return "≤ " + words.get(name, "{} " + name).format(f"{value:g}")


def latency_text(summary: Mapping[str, Any]) -> str:
    """By what latency is counted, and how far its sums are from forward passes of the whole model."""
    checks = summary["crosscheck"]
    words = f"Latency by the profile of {summary['profile']}, {summary['tokens']:,} tokens or images a pass"
    if not checks:
        return f"{words}; it has no forward pass of this model to check the sums by."
    off = [f"{check['scheme']} {check['discrepancy']:+.0%}".replace("-", "−") for check in checks]
    return f"{words}. The sum of the layers against a forward pass of the whole model: {', '.join(off)}."


def loss_text(loss: float | None) -> str:
    """A loss with three significant digits."""
    return "—" if loss is None else f"{loss:.3g}" if loss >= 1e-4 or loss == 0 else f"{loss:.2e}"
