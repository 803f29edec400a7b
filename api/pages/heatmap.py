"""Sensitivities as a Plotly heat map (a plain dict). Colours are the page's: traces name their role."""

from __future__ import annotations

import json
from html import escape
from itertools import groupby
from math import ceil, floor, log10
from typing import Any

from api.pages.metrics import SensitivityTable, parts_of, sensitivity_text

MOST_DECADES, LEAST_DECADES = 6, 0.5
"""Values are told apart over so many powers of ten, from the largest down."""


def heat_map(metric: str, table: SensitivityTable, units: list[dict[str, Any]]) -> dict[str, Any]:
    """A Plotly figure {"data", "layout"}: a row per scheme, a column per unit in network order.

    The colour is the logarithm of the value. Negative values are a trace of their own on the same scale, so that they
    can have a hue of their own; `meta` says which ("positive", "negative"). `units` are those of the search's summary.
    """
    numbers = [value for row in table["values"] for value in row if value is not None]
    sizes = [_magnitude(value) for value in numbers if value]
    high = max(sizes, default=0.0)
    low = min(max(min(sizes, default=0.0), high - MOST_DECADES), high - LEAST_DECADES)
    ticks = _ticks(low, high)

    def trace(negative: bool) -> dict[str, Any]:
        columns = [
            [value if value is not None and (value < 0) == negative else None for value in values]
            for values in zip(*table["values"], strict=True)
        ]
        return {
            "type": "heatmap",
            "meta": "negative" if negative else "positive",
            "y": table["schemes"],
            "z": [[_level(value, low) for value in row] for row in columns],
            "zmin": low,
            "zmax": high,
            "text": [
                [None if value is None else _hover(metric, table, row, column) for row, value in enumerate(values)]
                for column, values in enumerate(columns)
            ],
            "hovertemplate": "%{text}<extra></extra>",
            "hoverongaps": False,
            "colorbar": {"tickvals": ticks, "ticktext": [_power(tick) for tick in ticks]},
        }

    signs = sorted({value < 0 for value in numbers})
    return {"data": [trace(negative) for negative in signs], "layout": _blocks(table["units"], units)}


def payload(metric: str, table: SensitivityTable, units: list[dict[str, Any]]) -> str:
    """The heat map as JSON that may stand inside a script element."""
    return json.dumps(heat_map(metric, table, units), allow_nan=False).replace("<", "\\u003c")


def _level(value: float | None, low: float) -> float | None:
    """Where a value stands on the logarithmic scale."""
    return None if value is None else max(_magnitude(value), low) if value else low


def _magnitude(value: float) -> float:
    return round(log10(abs(value)), 4)


def _hover(metric: str, table: SensitivityTable, row: int, column: int) -> str:
    unit, scheme = _plain(table["units"][row]), table["schemes"][column]
    lines = [
        f"<b>{unit}</b>  {scheme}",
        sensitivity_text(metric, table, row, column),
        *parts_of(metric, table, row, column),
    ]
    return "<br>".join(lines)


def _ticks(low: float, high: float) -> list[float]:
    """Whole powers of ten, where two or more fit."""
    decades = range(ceil(low), floor(high) + 1)
    step = ceil(len(decades) / 5) or 1
    return [float(decade) for decade in decades[::step]] if len(decades) > 1 else [low, high]


def _power(tick: float) -> str:
    text = f"10<sup>{tick:.0f}</sup>" if tick.is_integer() and abs(tick) > 2 else f"{10**tick:.2g}"
    return text.replace("-", "−")


def _blocks(names: list[str], units: list[dict[str, Any]]) -> dict[str, Any]:
    """Where each block of the network begins, and a tick with its name in its middle."""
    block_of = {unit["name"]: unit["block"] for unit in units}
    places: list[tuple[str, int, int]] = []
    for block, members in groupby(enumerate(names), key=lambda member: block_of.get(member[1])):
        indices = [index for index, _ in members]
        if block:
            places.append((block, indices[0], indices[-1]))
    shared = _shared_prefix([block for block, _, _ in places])
    title = f"Block of {shared.rstrip('.')}" if shared else "Block" if places else "Units"
    edges = sorted({edge for _, first, last in places for edge in (first, last + 1)} - {0, len(names)})
    return {
        "xaxis": {
            "title": {"text": _plain(title)},
            "tickvals": [(first + last) / 2 for _, first, last in places],
            "ticktext": [_plain(block.removeprefix(shared)) for block, _, _ in places],
        },
        "shapes": [
            {"type": "line", "xref": "x", "yref": "paper", "x0": edge - 0.5, "x1": edge - 0.5, "y0": 0, "y1": 1}
            for edge in edges
        ],
    }


def _plain(text: str) -> str:
    """A text that Plotly takes for no markup."""
    return escape(text, quote=False)


def _shared_prefix(names: list[str]) -> str:
    """The dotted parts that all names begin with, short of a whole name."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(part + "." for part in shared)
