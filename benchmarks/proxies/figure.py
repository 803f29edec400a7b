"""The figure: rank correlations with their intervals, predictors × models, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from benchmarks.svg import drawing, line, text

if TYPE_CHECKING:
    from benchmarks.proxies.results import Result
    from search.agreement import Agreement

LABELS, PANEL, GAP, ROW, TOP, BOTTOM = 190, 210, 40, 26, 106, 40
LOWEST, TICKS = -0.5, (-0.5, 0.0, 0.5, 1.0)
STYLE = """
.zero { stroke: #9aa5b1 }
.interval { stroke: #2563a8; stroke-width: 2.5; stroke-linecap: round }
.dot { fill: #2563a8 } .control .interval { stroke: #98a2ad } .control .dot { fill: #98a2ad }
.stripe { fill: #f5f7f9 } .ceiling { fill: #f3e6c8 } .ceiling-line { stroke: #c08a1e; stroke-width: 1.5 }
"""


def draw_figure(panels: Mapping[str, Sequence[Result]], ceiling: str, controls: Sequence[str]) -> str:
    """SVG text: a panel for each model, a row for each predictor, best on average first, those that some models
    leave out and controls last; the ceiling's interval is shaded."""
    found = {title: {one.predictor: one.spearman for one in results} for title, results in panels.items()}
    rows = _ordered(found, ceiling, controls)
    width = LABELS + len(panels) * (PANEL + GAP) + 10
    height = TOP + len(rows) * ROW + BOTTOM
    parts = [
        drawing(width, height, "Rank correlation of predictions with held-out losses, at equal size", STYLE),
        text(16, 30, "How well metrics rank configurations of equal size", "head"),
        text(
            16,
            50,
            "Spearman’s ρ with the held-out loss, mean over bands of equal size, and 95 % bootstrap intervals. "
            "Shaded: the loss measured on calibration data.",
            "small",
        ),
    ]
    for index, row in enumerate(rows):
        if index % 2 == 0:
            parts.append(f'<rect class="stripe" x="0" y="{TOP + index * ROW}" width="{width}" height="{ROW}"/>')
        parts.append(text(LABELS - 14, TOP + (index + 0.5) * ROW + 4, row, "small" if row in controls else "", "end"))
    for index, (title, values) in enumerate(found.items()):
        parts += _panel(LABELS + index * (PANEL + GAP), title, values, rows, ceiling, controls)
    return "\n".join([*parts, "</svg>\n"])


def _ordered(found: Mapping[str, Mapping[str, Agreement | None]], ceiling: str, controls: Sequence[str]) -> list[str]:
    names = {name for values in found.values() for name in values} - {ceiling, *controls}

    def place(name: str) -> tuple[int, float, str]:
        """A mean over some of the models only is not to be compared with one over all."""
        values = [one.value for values in found.values() if (one := values.get(name))]
        return -len(values), -sum(values) / max(len(values), 1), name

    return [*sorted(names, key=place), *controls]


def _panel(
    left: float,
    title: str,
    values: Mapping[str, Agreement | None],
    rows: Sequence[str],
    ceiling: str,
    controls: Sequence[str],
) -> list[str]:
    def x(value: float) -> float:
        return left + PANEL * (max(value, LOWEST) - LOWEST) / (1 - LOWEST)

    bottom = TOP + len(rows) * ROW
    name, _, shape = title.partition(", ")
    parts = [text(left, TOP - 26, name, "panel"), text(left, TOP - 10, shape, "small")]
    if top := values.get(ceiling):
        parts.append(
            f'<rect class="ceiling" x="{x(top.low):.1f}" y="{TOP}" width="{x(top.high) - x(top.low):.1f}" '
            f'height="{bottom - TOP}"/>'
        )
        parts.append(line("ceiling-line", x(top.value), TOP, x(top.value), bottom))
    for tick in TICKS:
        parts.append(line("grid" if tick else "zero", x(tick), TOP, x(tick), bottom))
        parts.append(text(x(tick), bottom + 18, f"{tick:g}".replace("-", "−"), "small", "middle"))
    for index, row in enumerate(rows):
        one, y = values.get(row), TOP + (index + 0.5) * ROW
        if one is None:
            parts.append(text(x(0) + 8, y + 4, "left out" if row not in controls else "all equal", "small"))
            continue
        label = f"{row}: {one.value:.2f} ({one.low:.2f} to {one.high:.2f})"
        parts.append(f'<g class="{"control" if row in controls else "metric"}"><title>{escape(label)}</title>')
        parts.append(line("interval", x(one.low), y, x(one.high), y))
        parts.append(f'<circle class="dot" cx="{x(one.value):.1f}" cy="{y:.1f}" r="4.5"/></g>')
    return parts
