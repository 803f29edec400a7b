"""What the page of a point says in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import expm1

from api.frontier import Frontier
from api.pages.charts import baseline_name
from api.pages.views import percent, times
from api.resources import RESOURCES, loss_text
from search.candidate import Candidate

MEGABYTE = 1e6

# Below this share of the loss, a sentence gives no number.
LEAST_SAVED = 5e-4

CALIBRATION = "Loss on calibration data"


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A quantity of the point, of the baseline it is compared with, and of the full-precision model."""

    name: str
    point: str
    baseline: str
    full: str


def metric_rows(frontier: Frontier, point: Candidate, full_costs: Mapping[str, float]) -> list[MetricRow]:
    """The measured quantities and the costs, side by side; `full_costs` are those of 16 bits, as far as known."""
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
            full = words.text(full_costs[resource]) if resource in full_costs else ""
            rows.append(MetricRow(words.short, words.text(point.costs[resource]), of_base, full))
    return rows


@dataclass(frozen=True, slots=True)
class Card:
    """A quantity in large: its name, number and unit, and how it stands against full precision or the baseline."""

    name: str
    number: str
    unit: str
    note: str


FEWER = {"size_bytes": "smaller", "latency_us": "faster"}


def cards(frontier: Frontier, point: Candidate, full_costs: Mapping[str, float]) -> list[Card]:
    """What a reader looks for first: the loss or what was expected of it, and every cost against 16 bits."""
    found = [_loss_card(frontier, point)]
    for name in ("perplexity", "accuracy"):
        if name in point.metrics:
            full = _metric(name, frontier.full_precision.get(name))
            found.append(
                Card(name.capitalize(), _metric(name, point.metrics[name]), "", f"{full} unquantized" if full else "")
            )
    for resource, words in RESOURCES.items():
        if resource in point.costs:
            cost = point.costs[resource]
            ratio = full_costs.get(resource, 0.0) / cost if cost else 0.0
            note = f"{times(ratio)} {FEWER.get(resource, 'fewer')} than 16 bits" if ratio > 1 else ""
            found.append(Card(words.short, words.number(cost), "" if words.unit == "bits" else words.unit, note))
    return found


def _loss_card(frontier: Frontier, point: Candidate) -> Card:
    comparison = frontier.compare(point)
    if point.loss is not None:
        ratio = comparison.ratio if comparison else None
        against = f"{times(ratio)} less than {baseline_name(comparison.baseline)}" if comparison and ratio else ""
        if ratio is not None and ratio < 1 and comparison:
            against = f"{times(1 / ratio)} more than {baseline_name(comparison.baseline)}"
        error = point.metrics.get("loss_stderr")
        return Card("Loss" if frontier.settled else CALIBRATION, loss_text(point.loss), stderr_text(error), against)
    if "calibration_loss" in point.metrics:
        return Card(CALIBRATION, loss_text(point.metrics["calibration_loss"]), "", "not measured on held-out data")
    predicted = min(point.predicted.items(), default=None)
    if predicted is None:
        return Card("Loss", "—", "", "not measured")
    metric, value = predicted
    return Card("Predicted loss", loss_text(value), "", f"by {metric}; not measured")


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
        purpose = "reported: of what was accepted, the frontier leaves out only what a point that costs no more betters"
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


def stderr_text(error: float | None) -> str:
    """`± 0.002`; empty without one."""
    return f"±\u00a0{error:.1g}" if error else ""


def _loss(point: Candidate | None) -> str:
    return "" if point is None else f"{loss_text(point.loss)} {stderr_text(point.metrics.get('loss_stderr'))}".strip()


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.3f}"
