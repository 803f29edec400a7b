"""What the pages say of metrics: what they took, how they add up, and the sensitivities of a point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from api.metrics import is_relative, passes_number, rough_time, value_text
from db.searches import Search
from search.candidate import Candidate
from search.metrics import METRICS
from search.scheme import Scheme

SensitivityTable = dict[str, Any]
"""As the worker stored it: units, schemes, and units × schemes lists `values`, `weight`, `activation` and `stderr`."""


@dataclass(frozen=True, slots=True)
class MetricReport:
    """A metric of a search: what it took, how well it ranked what was measured, and what a person should know."""

    name: str
    evidence: str
    relative: bool
    took: str
    passes: str
    rank: str
    notes: list[str]


def metric_reports(search: Search) -> list[MetricReport]:
    """The metrics that have finished, in the order of the request."""
    summary = search.summary or {}
    costs, agreement = summary.get("metrics") or {}, summary.get("agreement") or {}
    return [
        _report(name, costs.get(name, {}), agreement.get(name))
        for name in search.request["sensitivity"]
        if name in costs or name in agreement
    ]


def _report(name: str, cost: dict[str, Any], agreement: dict[str, Any] | None) -> MetricReport:
    rank = "—"
    if agreement is not None:
        spearman, points = agreement["spearman"], agreement["points"]
        rank = "too few points" if spearman is None else f"{spearman:.2f} over {points} points".replace("-", "−")
    return MetricReport(
        name,
        METRICS[name].evidence if name in METRICS else "—",
        is_relative(name),
        "—" if "seconds" not in cost else "reused" if cost["reused"] else rough_time(cost["seconds"]),
        passes_number(cost["forward_passes"]) if "forward_passes" in cost else "—",
        rank,
        cost.get("notes", []),
    )


@dataclass(frozen=True, slots=True)
class Completeness:
    """A uniform scheme: what the signed shares of all units add up to, and what was measured."""

    scheme: str
    shares: str
    measured: str
    gap: str
    path: str


def completeness(metric: str, table: SensitivityTable) -> list[Completeness]:
    """How the shares of a path integral add up, by scheme; empty for other metrics."""
    checks = table["details"].get("completeness") or {}
    told = [scheme for scheme in table["schemes"] if {"shares", "measured"} <= set(checks.get(scheme) or {})]
    return [_completeness(metric, scheme, checks[scheme]) for scheme in told]


def _completeness(metric: str, scheme: str, check: dict[str, Any]) -> Completeness:
    shares, measured = check["shares"], check["measured"]
    gap = f"{(shares - measured) / measured:+.1%}".replace("-", "−") if measured else "—"
    path = [f"{check['nodes']} nodes" if "nodes" in check else "", check.get("rule", "").replace("_", " ")]
    words = ", ".join(filter(None, path))
    return Completeness(scheme, value_text(metric, shares), value_text(metric, measured), gap, words)


@dataclass(frozen=True, slots=True)
class Value:
    """A sensitivity: in words, the parts of weights and activations, and its size beside the metric's largest."""

    number: float
    text: str
    parts: list[str]
    share: float

    @property
    def negative(self) -> bool:
        """Whether the loss is predicted to fall."""
        return self.number < 0


@dataclass(frozen=True, slots=True)
class ChosenSensitivity:
    """A unit at its chosen scheme, by metric."""

    unit: str
    scheme: str
    values: dict[str, Value]


def chosen_sensitivities(
    point: Candidate, summary: dict[str, Any], tables: dict[str, SensitivityTable]
) -> list[ChosenSensitivity]:
    """The sensitivity of every unit at the point's scheme, the largest of the first metric first."""
    units = summary.get("units") or []
    chosen = {unit["name"]: scheme for unit in units if (scheme := point.allocation.get(unit["layers"][0]))}
    columns = {metric: _column(metric, table, chosen) for metric, table in tables.items()}
    rows = [
        ChosenSensitivity(unit, scheme, {metric: column[unit] for metric, column in columns.items() if unit in column})
        for unit, scheme in chosen.items()
    ]
    first = next(iter(columns.values()), {})
    return sorted(
        (row for row in rows if row.values), key=lambda row: -first[row.unit].number if row.unit in first else 0.0
    )


def _column(metric: str, table: SensitivityTable, chosen: dict[str, str]) -> dict[str, Value]:
    """A metric's value of each unit at its chosen scheme."""
    places = [
        (row, table["schemes"].index(chosen[unit]))
        for row, unit in enumerate(table["units"])
        if chosen.get(unit) in table["schemes"]
    ]
    numbers = {place: number for place in places if (number := table["values"][place[0]][place[1]]) is not None}
    largest = max(map(abs, numbers.values()), default=0.0) or 1.0
    return {
        table["units"][row]: Value(
            number,
            sensitivity_text(metric, table, row, column),
            parts_of(metric, table, row, column),
            abs(number) / largest,
        )
        for (row, column), number in numbers.items()
    }


def sensitivity_text(metric: str, table: SensitivityTable, row: int, column: int) -> str:
    """A sensitivity with its standard error."""
    return value_text(metric, table["values"][row][column], table["stderr"][row][column])


def parts_of(metric: str, table: SensitivityTable, row: int, column: int) -> list[str]:
    """What weights and activations contribute, where the scheme rounds activations."""
    if not Scheme.parse(table["schemes"][column]).quantizes_activations:
        return []
    halves = {"weights": table["weight"], "activations": table["activation"]}
    return [f"{name} {value_text(metric, half[row][column])}" for name, half in halves.items()]
