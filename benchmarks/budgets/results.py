"""What the runs of all seeds come to: a table of losses for each model, with intervals, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.budgets.figure import draw_figure
from benchmarks.budgets.found import Floats, Found
from benchmarks.report import table, write
from benchmarks.rivals.rivals import BUDGETS, PACKAGES

FIGURE = Path(__file__).parents[2] / "docs" / "search.svg"

METHODS = {
    "uniform": "uniform",
    "modelopt": "ModelOpt, ungrouped",
    "modelopt-grouped": "ModelOpt",
    "autoround": "AutoScheme",
    "unrefined": "unrefined",
    "refined": "refined",
}
RESAMPLES = 4000


def report(found: Sequence[Sequence[Found]], *, keep: bool) -> None:
    """Print the tables of studies × seeds; write them, and the figure, when they are to be kept."""
    parts = []
    for runs in found:
        parts += [f"## {runs[0].study.title}", table(_losses(runs)), _what_it_cost(runs), table(_ratios(runs))]
    if not keep:
        print("\n\n".join(parts))
        return
    FIGURE.write_text(draw_figure([runs[0] for runs in found if not runs[0].study.layers]))
    write(
        "budgets",
        "The loss at a budget: uniform, ModelOpt, AutoRound and ours",
        "make bench-budgets",
        [
            "Divergence from full precision (KL in nats per token or image; 1 − cosine for MiniLM) on held-out data: "
            "the mean of three splits of the data, none of which shares a sample with what any method saw. Budgets are "
            "mean bits of a code; scales cost everyone the same. All allocations are of the same layers, rounded by "
            "the same quantizer (`rtn`, symmetric; groups of 64, per output channel in EfficientNet) and measured by "
            "the same evaluator. Where our units are groups of channels, the other methods' are whole layers. "
            "*Unrefined*: the exact frontier of `fisher`. *Refined*: the loop of docs/search.md, whose measurements "
            "are of the same calibration samples, and whose acceptance uses as many more.",
            *parts,
            "Ratios of losses, with the 95 % interval of a bootstrap over the held-out samples of all splits, paired. "
            "`best other`: whichever of the other methods loses least at this budget on average. ModelOpt as it comes "
            "lets q, k and v, and gate and up, share their bits; *ungrouped*, these rules are cleared. "
            "Below 1, ours loses less. Seconds are of one thread each, beside other work.",
        ],
    )


def _losses(runs: Sequence[Found]) -> list[dict[str, object]]:
    rows = []
    for method, name in METHODS.items():
        if method not in runs[0].losses:
            continue
        row: dict[str, object] = {"": name}
        for budget in BUDGETS:
            mean = _mean(runs, method, budget)
            row[f"{budget:g}"] = float("nan") if mean is None else mean
        rows.append(row)
    return rows


def _ratios(runs: Sequence[Found]) -> list[dict[str, object]]:
    rows = []
    others = ("uniform", *PACKAGES, "best other")
    for ours, all_others in {"unrefined": others, "refined": (*others, "unrefined")}.items():
        for against in all_others:
            row: dict[str, object] = {"": f"{ours} ÷ {METHODS.get(against, against)}"}
            for budget in BUDGETS:
                row[f"{budget:g}"] = _ratio(runs, ours, against, budget)
            if any(value != "–" for value in list(row.values())[1:]):
                rows.append(row)
    return rows


def _ratio(runs: Sequence[Found], ours: str, against: str, budget: float) -> str:
    if against == "best other":
        others = {name: _mean(runs, name, budget) for name in ("uniform", *PACKAGES)}
        known = {name: mean for name, mean in others.items() if mean is not None}
        against = min(known, key=lambda name: known[name])
    if _mean(runs, against, budget) is None or _mean(runs, ours, budget) is None:
        return "–"
    own, other = (np.concatenate([run.losses[name][budget] for run in runs]) for name in (ours, against))
    low, high = interval(own, other)
    return f"{own.mean() / other.mean():.2f} ({low:.2f} to {high:.2f})"


def interval(own: Floats, other: Floats) -> tuple[float, float]:
    """Of the ratio of means: the percentiles of paired resamples."""
    counts = np.random.default_rng(0).multinomial(len(own), np.full(len(own), 1 / len(own)), size=RESAMPLES)
    low, high = np.quantile((counts @ own) / (counts @ other), [0.025, 0.975])
    return float(low), float(high)


def _what_it_cost(runs: Sequence[Found]) -> str:
    seconds = {
        name: float(np.mean([run.seconds[method] for run in runs]))
        for method, name in METHODS.items()
        if method in runs[0].seconds
    }
    evaluations = float(np.mean([run.evaluations for run in runs]))
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    of_refined = f"; refined includes unrefined, {evaluations:.0f} evaluations, and acceptance" if evaluations else ""
    measured = " and ".join(sorted({f"{run.day} ({run.machine})" for run in runs}))
    return (
        f"{runs[0].study.data} for each of calibration, acceptance and held-out. Mean seconds: {spent} (all budgets "
        f"from one run{of_refined}). "
        f"Measured {measured}."
    )


def _mean(runs: Sequence[Found], method: str, budget: float) -> float | None:
    if not all(budget in run.losses.get(method, {}) for run in runs):
        return None
    return float(np.mean([run.losses[method][budget].mean() for run in runs]))
