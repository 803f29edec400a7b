"""The results: rank correlations of every metric with held-out losses, as a table, a CSV file and a figure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.proxies.figure import draw_figure
from benchmarks.proxies.measuring import MOST_PASSES, Measured
from benchmarks.report import RESULTS, table, write
from search.agreement import Agreement, kendall_tau, spearman_rho, within_bands
from search.metrics import METRICS
from workers.sensitivity.gauss_newton import joint

CEILING = "the measured loss, on calibration data"
CONTROLS = ("size", "random")
"""Predictors that know nothing of the loss."""


@dataclass(frozen=True)
class Result:
    """How a predictor agrees with a model's held-out losses.

    `ratios` are the medians of predicted ÷ actual by band, of predictors in units of the loss; `spearman_of_band`
    Spearman's ρ by band.
    """

    model: str
    predictor: str
    spearman: Agreement | None
    kendall: Agreement | None
    spearman_of_band: dict[float, Agreement | None]
    ratios: dict[float, float]
    seconds: float = float("nan")
    passes: float = float("nan")
    measured_passes: float = float("nan")


def report(found: list[Measured], keep: bool) -> None:
    """Print the table; `keep`: also write it, with its CSV file and figure."""
    results = {one.study.name: _results(one) for one in found}
    rows = [_row(one, result) for one in found for result in results[one.study.name]]
    if not keep:
        print(table(rows) if rows else "nothing to report yet")
        return
    everything = [result for of_model in results.values() for result in of_model]
    path = write(
        "proxies",
        "How well metrics rank configurations of equal size",
        "make bench-proxies",
        [_text(found), table(rows)],
    )
    pd.DataFrame([line for result in everything for line in _lines(result)]).to_csv(
        path.with_suffix(".csv"), index=False, float_format="%.6g"
    )
    figure = RESULTS.parents[1] / "docs" / "proxies.svg"
    figure.write_text(draw_figure({one.study.title: results[one.study.name] for one in found}, CEILING, CONTROLS))
    print(f"{path}\n{path.with_suffix('.csv')}\n{figure}")


def _results(one: Measured) -> list[Result]:
    inside = np.isfinite(one.bands)
    choices, bands, actual = one.choices[inside], one.bands[inside], one.losses["held_out"][inside]

    def result(predictor: str, predicted: NDArray[np.float64], *, in_loss_units: bool, **cost: float) -> Result:
        by_band = {float(band): bands == band for band in np.unique(bands)}
        return Result(
            one.study.name,
            predictor,
            within_bands(spearman_rho, predicted, actual, bands),
            within_bands(kendall_tau, predicted, actual, bands),
            {band: within_bands(spearman_rho, predicted[at], actual[at], bands[at]) for band, at in by_band.items()},
            {band: float(np.median(predicted[at] / actual[at])) for band, at in by_band.items()}
            if in_loss_units
            else {},
            **cost,
        )

    metrics = [
        result(
            name,
            timed.table.values.to_numpy()[np.arange(len(one.space.units)), choices].sum(axis=1),
            in_loss_units=METRICS[name].in_loss_units,
            seconds=timed.seconds,
            passes=METRICS[name].forward_passes(one.space),
            measured_passes=timed.seconds / timed.forward_seconds,
        )
        for name, timed in one.tables.items()
    ]
    if "gauss_newton" in one.tables:
        timed = one.tables["gauss_newton"]
        units, schemes = list(timed.table.weight.index), np.array(timed.table.weight.columns)
        together = [joint(timed.table, dict(zip(units, schemes[choice], strict=True)))[0] for choice in choices]
        metrics.append(result("gauss_newton, joint", np.array(together), in_loss_units=True, seconds=timed.seconds))
    return [
        result(CEILING, one.losses["calibration"][inside], in_loss_units=True),
        *sorted(
            metrics,
            key=lambda found: (found.predictor in CONTROLS, -found.spearman.value if found.spearman else 1.0),
        ),
        # A stream of its own: that of seed 0 drew the configurations.
        result("random", np.random.default_rng(1).random(len(choices)), in_loss_units=False),
    ]


def _row(one: Measured, result: Result) -> dict[str, object]:
    return {
        "model": one.study.name,
        "predictor": result.predictor,
        "Spearman ρ": _interval(result.spearman),
        "Kendall τ-b": _interval(result.kendall),
        "ρ by band": " · ".join(f"{found.value:.2f}" if found else "–" for found in result.spearman_of_band.values()),
        "predicted ÷ actual by band": " · ".join(f"{ratio:.2g}" for ratio in result.ratios.values()) or "–",
        "seconds": result.seconds,
        "forward passes": "–" if np.isnan(result.passes) else f"{result.measured_passes:.0f} ({result.passes:.0f})",
    }


def _interval(found: Agreement | None) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})" if found else "–"


def _lines(result: Result) -> list[dict[str, object]]:
    """Of the CSV file: the mean over bands, then each band."""
    overall = {
        "model": result.model,
        "predictor": result.predictor,
        "band": "all",
        **_columns("spearman", result.spearman),
        **_columns("kendall", result.kendall),
        "seconds": result.seconds,
        "forward_passes": result.passes,
        "measured_forward_passes": result.measured_passes,
    }
    return [
        overall,
        *(
            {
                "model": result.model,
                "predictor": result.predictor,
                "band": band,
                **_columns("spearman", found),
                "predicted_to_actual": result.ratios.get(band, float("nan")),
            }
            for band, found in result.spearman_of_band.items()
        ),
    ]


def _columns(name: str, found: Agreement | None) -> dict[str, float]:
    values = (found.value, found.low, found.high) if found else (float("nan"),) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _text(found: list[Measured]) -> str:
    lines = [
        "Weights only, symmetric `rtn`; transformers in groups of 64, the others per channel. A metric's prediction of "
        "a configuration is the sum of its table's entries (`joint`: with the interactions between layers). It is "
        "ranked against the loss measured on held-out data, among configurations of equal size: the correlations are "
        "means over bands of stored bits, with 95 % bootstrap intervals over the configurations of each band. "
        "Predicted ÷ actual is the median of a band, for metrics in units of the loss. Seconds are those of a table on "
        "an evaluator that has computed nothing yet; forward passes over the calibration split are those seconds in "
        "units of a plain pass (in brackets: what `search/metrics.py` states).",
    ]
    for one in found:
        inside = np.isfinite(one.bands)
        unit = "mean code bits" if one.study.bands else "mean stored bits, of 4096 enumerated configurations"
        counts = [int((one.bands == band).sum()) for band in np.unique(one.bands[inside])]
        number = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        losses = [
            f"{band:g} ({np.median(one.losses['held_out'][one.bands == band]):.2g})"
            for band in np.unique(one.bands[inside])
        ]
        left_out = ", ".join(f"{name} ({why})" for name, why in one.left_out.items())
        lines.append(
            f"- `{one.study.name}`: {one.study.title}; {one.study.data}; {number} configurations in each of the bands "
            f"{', '.join(losses)} ({unit}; in brackets the median loss)."
            + (f" Left out: {left_out}." if left_out else "")
        )
    lines.append(f"A metric of more than {MOST_PASSES} forward passes is left out.")
    return "\n".join(lines)
