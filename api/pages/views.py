"""What the templates say in words: verdicts and comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1

from api.frontier import Frontier
from api.pages.charts import baseline_name
from api.resources import RESOURCES, latency_text, loss_text
from db.searches import Search
from search.budget import BUDGETS
from search.candidate import Candidate

MEGABYTE = 1e6

# Below this share of the loss, a sentence gives no number.
LEAST_SAVED = 5e-4

# Costs this close are "the same" in a sentence.
SAME = 0.005


def verdict(frontier: Frontier, point: Candidate) -> str:
    """One sentence: how a point stands against the uniform baselines."""
    phrase = RESOURCES[frontier.axes[0]].phrase
    if point.loss is None:
        return _not_reported(point)
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


def _not_reported(point: Candidate) -> str:
    if "acceptance_loss" in point.metrics:
        return "On data that the search had not seen, it did not clearly beat what costs no more."
    if "calibration_loss" in point.metrics:
        return "Searched only: on the calibration data, others did better at its cost."
    return "Not measured: what is shown is predicted."


def best_verdict(frontier: Frontier) -> str:
    """One sentence: how the best point stands against the best uniform baseline that fits the same budgets, in what is
    sought."""
    best = frontier.best
    if best is None:
        return ""
    if best.source == "uniform":
        return verdict(frontier, best)
    fitting = [base for base in frontier.baselines if base.fits]
    if not fitting:
        return "No uniform configuration fits."
    if frontier.objective != "loss":
        return _saved(best, fitting, BUDGETS[frontier.objective].resource)
    base = min(fitting, key=lambda point: point.metrics["loss"])
    ratio = base.metrics["loss"] / best.metrics["loss"] if best.metrics["loss"] > 0 else None
    return _against(ratio, base, f"uniform {baseline_name(base)}, the best uniform configuration that fits")


def _saved(best: Candidate, uniform: list[Candidate], resource: str) -> str:
    base = min(uniform, key=lambda point: point.costs[resource])
    share = 1 - best.costs[resource] / base.costs[resource]
    less = {"size_bytes": "smaller"}.get(resource, f"fewer {RESOURCES[resource].phrase}")
    amount = f"{percent(share)} {less}" if share >= SAME else f"Not {less}"
    return f"{amount} than uniform {baseline_name(base)}, the cheapest uniform configuration that fits."


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
    rows = [] if point.loss is None else [MetricRow("Loss", _loss(point), _loss(base), "0")]
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


@dataclass(frozen=True, slots=True)
class SplitRow:
    """A loss of the point: what it was expected to be, and on each split of the data, with what that split is for."""

    name: str
    loss: str
    purpose: str


def split_rows(frontier: Frontier, point: Candidate) -> list[SplitRow]:
    """What was expected of a point, and what was measured, in the order in which it became known."""
    metrics, expected, rows = point.metrics, point.expected, []
    if expected:
        interval = f"{loss_text(expected['low'])} to {loss_text(expected['high'])}"
        rows.append(SplitRow("Expected", interval, "90 % interval, before anything of this point was measured"))
    if "calibration_loss" in metrics:
        share = metrics.get("calibration_share", 1.0)
        purpose = "searched: the points that were tried are compared on it, so that it flatters the winners"
        if share < 1:
            purpose = f"an estimate from the first {percent(share)} of the data, where others already did better"
        rows.append(SplitRow("Calibration data", loss_text(metrics["calibration_loss"]), purpose))
    if "acceptance_loss" in metrics:
        purpose = "decides: only what beats its rivals on it, unseen by the search, is on the frontier"
        rows.append(SplitRow("Acceptance data", loss_text(metrics["acceptance_loss"]), purpose))
    if frontier.settled and point.loss is not None:
        purpose = "reported: of what was accepted, the frontier leaves out only what a cheaper point betters here"
        if expected:
            within = expected["low"] <= point.loss <= expected["high"]
            purpose += f"; {'within' if within else 'outside'} the expected interval"
        rows.append(SplitRow("Held-out data", _loss(point), purpose))
    return rows


def price_sentences(point: Candidate) -> list[str]:
    """What a bit more of each resource would save of the loss: `1 MB more would save about 3 % of the loss.`

    A price is a slope of log loss: over an amount, the loss falls by 1 − exp(−price × amount).
    """
    sentences = []
    for name, price in point.shadow_prices.items():
        resource, _, of = name.partition(" of ")
        amount, words = _amount(resource, point.costs[name])
        share = -expm1(-price * amount)
        saved = f"save about {percent(share)} of the loss" if share >= LEAST_SAVED else "save next to nothing"
        sentences.append(f"{words}{f' for {of}' if of else ''} would {saved}.")
    return sentences


def _amount(resource: str, total: float) -> tuple[float, str]:
    """A little more of a resource, and what it is called."""
    if resource == "avg_bits":
        return 0.1, "0.1 bits per weight more"
    if resource == "size_bytes" and 0.05 * total >= MEGABYTE:
        return MEGABYTE, "1 MB more"
    return 0.01 * total, f"1 % more {RESOURCES[resource].phrase}"


def percent(share: float) -> str:
    """`3 %`; `0.4 %` below one."""
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1f} %"


def trust_rows(search: Search) -> list[tuple[str, str]]:
    """How far to believe the result: evaluations spent, finalists accepted, and how often expectations held."""
    summary, rows = search.summary or {}, []
    if "evaluations" in summary:
        most = search.request["optimizer"]["evaluations"]
        rows.append(("Evaluations", f"{summary['evaluations']:.3g} spent, of {most} at most"))
    if told := summary.get("acceptance"):
        words = f"{told['accepted']} of {told['finalists']} finalists, on data that the search had not seen"
        rows.append(("Accepted", words))
    if (told := summary.get("coverage")) and told["points"]:
        within, level = f"{told['within']} of {told['points']}", percent(told["level"])
        rows.append(("Expected", f"{within} reported losses lie within the {level} interval expected before measuring"))
    if told := summary.get("latency"):
        rows.append(("Latency", latency_text(told)))
    return rows


def _loss(point: Candidate | None) -> str:
    if point is None:
        return ""
    error = point.metrics.get("loss_stderr")
    return loss_text(point.loss) + (f" ± {error:.1g}" if error else "")


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.3f}"
