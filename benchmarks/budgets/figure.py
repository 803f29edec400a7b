"""The figure of docs/search.md: the frontier before and after refinement, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, floor, log10

import numpy as np

from benchmarks.budgets.found import Found
from benchmarks.rivals.rivals import BUDGETS
from benchmarks.svg import drawing, line, text

LEFT, PANEL, HEIGHT, GAP, TOP, BOTTOM = 70, 330, 300, 60, 96, 52
STYLE = """
.trial { fill: #b9c6d3 } .interval { stroke: #d5dee7; stroke-width: 1 }
.uniform { fill: #7a4ea3 } .modelopt { fill: #d0662c } .before { stroke: #7f8b97; fill: none; stroke-width: 2 }
.predicted { stroke: #7f8b97; fill: none; stroke-width: 1.5; stroke-dasharray: 4 4 }
.after { stroke: #2563a8; fill: none; stroke-width: 2.5 }
"""


def draw_figure(runs: Sequence[Found]) -> str:
    """SVG text: a panel for each study, mean bits of a code against the loss (log scale)."""
    width = LEFT + len(runs) * (PANEL + GAP)
    height = TOP + HEIGHT + BOTTOM
    parts = [
        drawing(width, height, "Frontiers before and after refinement, predicted and measured", STYLE),
        text(16, 30, "Before and after refinement, predicted and measured", "head"),
        text(
            16,
            50,
            "Dashed: what the uncorrected metric predicts of its own frontier. Grey: what that frontier loses on "
            "held-out data. Blue: after refinement. Purple: uniform. Orange: ModelOpt.",
            "small",
        ),
        text(16, 66, "Dots: configurations measured on the way, with the 90 % interval expected before each.", "small"),
    ]
    for index, run in enumerate(runs):
        parts += _panel(LEFT + index * (PANEL + GAP), run)
    return "\n".join([*parts, "</svg>\n"])


def _panel(left: float, run: Found) -> list[str]:
    means = {
        method: {budget: float(losses.mean()) for budget, losses in found.items()}
        for method, found in run.losses.items()
    }
    shown = [
        *(value for found in means.values() for budget, value in found.items() if BUDGETS[0] <= budget <= BUDGETS[-1]),
        *run.predicted.values(),
    ]
    low, high = floor(log10(min(shown))), ceil(log10(max(shown)))

    def x(bits: float) -> float:
        return left + PANEL * (bits - 2.25) / (6.25 - 2.25)

    def y(loss: float) -> float:
        return TOP + HEIGHT * (high - np.clip(log10(max(loss, 1e-12)), low, high)) / (high - low)

    parts = [text(left, TOP - 10, run.study.title, "panel")]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(line("grid", left, at, left + PANEL, at))
        parts.append(text(left - 8, at + 4, f"{10.0**power:g}", "small", "end"))
    parts += [text(x(bits), TOP + HEIGHT + 18, str(bits), "small", "middle") for bits in range(3, 7)]
    parts.append(text(left + PANEL / 2, TOP + HEIGHT + 38, "mean bits of a code", "small", "middle"))
    for tried in run.trials:
        if not 2.25 <= tried.bits <= 6.25:
            continue
        if tried.expected:
            mean, deviation = tried.expected
            ends = [y(exp(mean + side * 1.645 * deviation)) for side in (-1, 1)]
            parts.append(line("interval", x(tried.bits), ends[0], x(tried.bits), ends[1]))
        parts.append(f'<circle class="trial" cx="{x(tried.bits):.1f}" cy="{y(tried.loss):.1f}" r="2.5"/>')
    for kind, values in (("predicted", run.predicted), ("before", means["unrefined"]), ("after", means["refined"])):
        points = " ".join(f"{x(bits):.1f},{y(loss):.1f}" for bits, loss in sorted(values.items()))
        parts.append(f'<polyline class="{kind}" points="{points}"/>')
    for kind in ("uniform", "modelopt"):
        parts += [
            f'<circle class="{kind}" cx="{x(bits):.1f}" cy="{y(loss):.1f}" r="4.5"/>'
            for bits, loss in means[kind].items()
            if 2.25 <= bits <= 6.25
        ]
    return parts
