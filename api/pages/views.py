"""What the templates say in words: verdicts and comparisons."""

from __future__ import annotations

from dataclasses import dataclass

from api.frontier import Frontier
from api.pages.charts import baseline_name
from api.resources import RESOURCES, latency_text, loss_text
from db.searches import Search
from search.budget import BUDGETS
from search.candidate import Candidate

# Costs this close are "the same" in a sentence.
SAME = 0.005

OTHER_DATA = (
    "the interval leaves out by how much another part of the data is easier or harder than the calibration data"
)


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
        words = f"{within} reported losses lie within the {level} interval expected before measuring"
        rows.append(("Expected", f"{words}; {OTHER_DATA}"))
    if told := summary.get("latency"):
        rows.append(("Latency", latency_text(told)))
    return rows


@dataclass(frozen=True, slots=True)
class Work:
    """How much of a search was computed, how much was there already, and from which searches."""

    computed: str
    reused: str
    sources: tuple[int, ...]


def work_done(search: Search, *, named: bool) -> Work | None:
    """What was computed and reused, once that is known; searches are `named` for who may see them all."""
    summary = search.summary or {}
    if "computed" not in summary or "reused" not in summary:
        return None
    computed, reused = summary["computed"], summary["reused"]
    return Work(
        f"{computed} {'result' if computed == 1 else 'results'} computed",
        f"{reused or 'none'} reused",
        tuple(summary.get("reused_from") or ()) if named else (),
    )
