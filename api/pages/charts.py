"""The frontier as Plotly figures (plain dicts), one per cost axis. Colours are the page's: traces name their role."""

from __future__ import annotations

import json
from math import log10
from typing import Any

from api.frontier import Frontier
from api.pages.render import STATIC, plotly_script, template
from api.resources import RESOURCES, loss_text
from search.candidate import Candidate

Figure = dict[str, Any]

LEGEND = ("frontier", "best", "baseline", "dominated", "over", "searched", "lower_bound", "rate_distortion")
REFERENCES = {
    "lower_bound": "least predicted (calibration data)",
    "rate_distortion": "rate–distortion limit (ideal quantizer)",
}

STRETCH = 0.35
"""A reference line that makes the axis longer than this waits in the legend."""


def frontier_figures(frontier: Frontier) -> dict[str, Figure]:
    """Resource → figure {"data", "layout"}, the main axis first; empty while nothing is measured.

    Every trace has `meta` with its role (one of `LEGEND`), from which the page's script takes its colour, and
    `customdata` with the numbers of its points. On the main axis lie two reference lines; where one waits in the
    legend, `meta` of the layout has the range of losses that shows it.
    """
    if not frontier.measured:
        return {}
    known = [name for name in RESOURCES if all(name in point.costs for point in frontier.measured)]
    ordered = sorted(known, key=lambda name: frontier.axes.index(name) if name in frontier.axes else len(known))
    return {resource: _figure(frontier, resource) for resource in ordered}


def standalone_page(frontier: Frontier) -> str:
    """The frontier as one HTML file that needs nothing else."""
    return template(
        "standalone.html",
        frontier=frontier,
        search=frontier.search,
        rows=frontier.measured,
        knee=frontier.knee,
        payload=payload(frontier),
        style=(STATIC / "bitfrontier.css").read_text(),
        script=(STATIC / "chart.js").read_text(),
        plotly_script=plotly_script().read_text(),
    )


def payload(frontier: Frontier) -> str:
    """The figures as JSON that may stand inside a script element."""
    return json.dumps(frontier_figures(frontier), allow_nan=False).replace("<", "\\u003c")


def _figure(frontier: Frontier, resource: str) -> Figure:
    floor = frontier.floor
    line = frontier.line(resource)
    on_line = {point.number for point in line}
    others = [point for point in frontier.measured if point.source != "uniform" and point.number not in on_line]
    best = [frontier.best] if frontier.best else []

    def trace(role: str, name: str, points: list[Candidate], **style: Any) -> dict[str, Any]:
        scale = RESOURCES[resource].scale
        return {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "meta": role,
            "legendrank": LEGEND.index(role),
            "x": [point.costs[resource] / scale for point in points],
            "y": [max(shown_loss(point), floor) for point in points],
            "customdata": [point.number for point in points],
            "text": [hover_text(point) for point in points],
            "hovertemplate": "%{text}<extra></extra>",
        } | style

    traces = [
        trace("searched", "searched (calibration data)", frontier.searched, marker={"size": 5, "opacity": 0.7}),
        trace("over", "over budget", [p for p in others if not p.fits], marker={"size": 7, "symbol": "circle-open"}),
        trace("dominated", "dominated", [p for p in others if p.fits], marker={"size": 7}),
        trace(
            "frontier",
            "measured frontier",
            line,
            mode="lines+markers",
            line={"width": 2, "shape": "hv"},
            marker={"size": 9},
        ),
        trace("best", "best that fits", best, marker={"size": 17, "symbol": "circle-open", "line": {"width": 2.5}}),
        trace("baseline", "uniform baseline", frontier.baselines, marker={"size": 11, "symbol": "diamond"}),
    ]
    layout = _layout(frontier, resource)
    if frontier.reference and resource == frontier.reference["axis"]:
        traces = [*_reference_lines(frontier.reference, layout), *traces]
    return {"data": [item for item in traces if item["x"]], "layout": layout}


def shown_loss(point: Candidate) -> float:
    """The loss of a measured point; of one that went no further, that on the calibration data."""
    return point.metrics["calibration_loss"] if point.loss is None else point.loss


def _reference_lines(reference: dict[str, Any], layout: dict[str, Any]) -> list[dict[str, Any]]:
    """A trace of each line; the axis of the loss makes room for those that do not stretch it too much."""
    scale, axis, lines = RESOURCES[reference["axis"]].scale, layout["yaxis"], []
    (low, high), widest = axis["range"], list(axis["range"])
    for role, name in REFERENCES.items():
        losses = [loss if loss > 0 else None for loss in reference[role] or []]
        told = [log10(loss) for loss in losses if loss]
        if not told:
            continue
        ends = min([low, *told]), max([high, *told])
        shown = ends[1] - ends[0] <= (1 + STRETCH) * (high - low)
        if shown:
            axis["range"] = [min(ends[0], axis["range"][0]), max(ends[1], axis["range"][1])]
        widest = [min(ends[0], widest[0]), max(ends[1], widest[1])]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "meta": role,
                "legendrank": LEGEND.index(role),
                "x": [level / scale for level in reference["levels"]],
                "y": losses,
                "customdata": [],
                "visible": True if shown else "legendonly",
                "hovertemplate": name + "<br>loss %{y:.3g}<extra></extra>",
                "line": {"width": 1.3, "dash": "dot" if role == "lower_bound" else "dashdot"},
            }
        )
    if widest != axis["range"]:
        layout["meta"] = {"widest": widest}
    return lines


def hover_text(point: Candidate) -> str:
    """What a point says of itself."""
    costs = " · ".join(RESOURCES[name].text(value) for name, value in point.costs.items() if name in RESOURCES)
    lines = [f"<b>Point {point.number}</b>  {point.label}", f"loss {loss_text(shown_loss(point))}", costs]
    lines += [f"{name} {point.metrics[name]:.4g}" for name in ("perplexity", "accuracy") if name in point.metrics]
    remark = "searched on the calibration data only" if point.loss is None else "" if point.fits else "over budget"
    return "<br>".join([*lines, *([f"<i>{remark}</i>"] if remark else [])])


def _layout(frontier: Frontier, resource: str) -> dict[str, Any]:
    scale, floor = RESOURCES[resource].scale, frontier.floor
    shapes: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    drawn = [*frontier.measured, *frontier.searched]
    left, right = _span([point.costs[resource] / scale for point in drawn])
    low, high = _span([log10(max(shown_loss(point), floor)) for point in drawn])
    if resource in frontier.ends:
        x = frontier.ends[resource] / scale
        shapes.append({"type": "line", "xref": "x", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1})
        near = left - (right - left) <= x <= right + (right - left)
        if near and not left < x < right:
            left, right = _span([left, right, x], margin=0.02)
        notes.append(
            {
                "xref": "x",
                "yref": "paper",
                "x": x,
                "y": 0,
                "text": f" budget {x:g} ",
                "xanchor": "left" if x < (left + right) / 2 else "right",
                "yanchor": "bottom",
            }
        )
    if "loss_increase" in frontier.budgets:
        y = frontier.budgets["loss_increase"]
        shapes.append({"type": "line", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": y, "y1": y})
        notes.append({"xref": "paper", "yref": "y", "x": 1, "y": y, "text": f"budget {y:g}", "xanchor": "right"})
    # An annotation rather than a text trace: its place on a log axis is the logarithm, and it never clips.
    notes += [
        {
            "x": point.costs[resource] / scale,
            "y": log10(max(point.metrics["loss"], floor)),
            "text": baseline_name(point),
            "xanchor": "left",
            "xshift": 9,
            "yshift": 8,
            "meta": "baseline",
        }
        for point in frontier.baselines
    ]
    knee = frontier.knee
    if knee and resource == frontier.axes[0]:
        x, y = knee.costs[resource] / scale, log10(max(knee.metrics["loss"], floor))
        notes.append({"x": x, "y": y, "text": "knee", "yshift": -16, "meta": "knee"})
    for note in notes:
        note |= {"showarrow": False}
        if note.get("yref") == "y":
            note |= {"y": log10(note["y"]), "yanchor": "bottom"}
    return {
        "xaxis": {"title": {"text": RESOURCES[resource].title}, "range": [left, right]},
        "yaxis": {
            "title": {"text": "Loss against full precision" + ("" if frontier.settled else ", on calibration data")},
            "type": "log",
            "range": [low, high],
            "dtick": "D2" if high - low < 3 else 1,
        },
        "shapes": shapes,
        "annotations": notes,
    }


def _span(values: list[float], margin: float = 0.06) -> tuple[float, float]:
    """An axis range around `values`: Plotly's own would make room for the words of annotations."""
    least, most = min(values), max(values)
    room = (most - least) * margin or abs(most) * 0.05 or 1.0
    return least - room, most + room


def baseline_name(point: Candidate) -> str:
    """A uniform baseline by its scheme."""
    return point.label.removeprefix("uniform").strip(" :") or point.label
