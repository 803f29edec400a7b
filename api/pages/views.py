"""What the templates say in words: verdicts and comparisons."""

from __future__ import annotations

from dataclasses import dataclass

from api.frontier import Frontier
from api.pages.charts import baseline_name
from api.resources import RESOURCES, loss_text
from search.candidate import Candidate

# Costs this close are "the same" in a sentence.
SAME = 0.005


def verdict(frontier: Frontier, point: Candidate) -> str:
    """One sentence: how a point stands against the uniform baselines."""
    phrase = RESOURCES[frontier.axes[0]].phrase
    if point.loss is None:
        return "Not measured: what is shown is predicted."
    if point.source == "uniform":
        return f"A uniform configuration: every searched layer at {baseline_name(point)}."
    comparison = frontier.compare(point)
    if comparison is None:
        return f"Fewer {phrase} than every uniform configuration." if frontier.baselines else ""
    base, ratio = comparison.baseline, comparison.ratio
    close = point.costs[comparison.resource] <= base.costs[comparison.resource] * (1 + SAME)
    where = f"at the same {phrase}" if close else f"the best uniform configuration with no more {phrase}"
    name = f"uniform {baseline_name(base)}"
    return _against(ratio, base, f"{name} {where}" if close else f"{name}, {where}")


def best_verdict(frontier: Frontier) -> str:
    """One sentence: how the best point stands against the best uniform baseline that fits the same budgets."""
    best = frontier.best
    if best is None:
        return ""
    if best.source == "uniform":
        return verdict(frontier, best)
    fitting = [base for base in frontier.baselines if base.fits]
    if not fitting:
        return "No uniform configuration fits."
    base = min(fitting, key=lambda point: point.metrics["loss"])
    ratio = base.metrics["loss"] / best.metrics["loss"] if best.metrics["loss"] > 0 else None
    return _against(ratio, base, f"uniform {baseline_name(base)}, the best uniform configuration that fits")


def _against(ratio: float | None, base: Candidate, name: str) -> str:
    if ratio is None:
        return f"No measurable loss, against {loss_text(base.loss)} of {name}."
    if ratio >= 1 + SAME:
        return f"{times(ratio)} less loss than {name}."
    if ratio > 1 - SAME:
        return f"The same loss as {name}."
    return f"{times(1 / ratio)} more loss than {name}."


def times(ratio: float) -> str:
    """`1.8×`."""
    return f"{ratio:.2f}×" if ratio < 1.1 else f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A quantity of the point, of the baseline it is compared with, and of the full-precision model."""

    name: str
    point: str
    baseline: str
    full: str


def metric_rows(frontier: Frontier, point: Candidate) -> list[MetricRow]:
    """The measured quantities and the costs, side by side."""
    comparison = frontier.compare(point)
    base = comparison.baseline if comparison else None
    rows = [MetricRow("Loss", _loss(point), _loss(base), "0")]
    for name in ("perplexity", "accuracy"):
        if name in point.metrics:
            of_base = _metric(name, base.metrics.get(name) if base else None)
            full = _metric(name, frontier.full_precision.get(name))
            rows.append(MetricRow(name.capitalize(), _metric(name, point.metrics[name]), of_base, full))
    for resource, words in RESOURCES.items():
        if resource in point.costs:
            of_base = words.text(base.costs[resource]) if base else ""
            full = "16 bits" if resource == "avg_bits" else ""
            rows.append(MetricRow(words.short, words.text(point.costs[resource]), of_base, full))
    return rows


def _loss(point: Candidate | None) -> str:
    if point is None or point.loss is None:
        return ""
    error = point.metrics.get("loss_stderr")
    return loss_text(point.loss) + (f" ± {error:.1g}" if error else "")


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.3f}"
