"""The page of a search's sensitivities: a sortable table, how metrics agree in ranking, and what stands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from api.metrics import value_text
from api.pages.metrics import SensitivityTable, parts_of, sensitivity_text
from api.sensitivities import sensitivity_table
from search.errors import InvalidRequest
from search.outliers import stand_out, times_median

NETWORK_ORDER = "network"
ROWS = 100
"""Units on a page of the table."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A unit at a scheme: in words, its size beside the largest of the scheme, and whether it stands out."""

    text: str
    parts: list[str]
    share: float
    negative: bool
    outlier: bool


@dataclass(frozen=True, slots=True)
class UnitRow:
    """A unit at every scheme; None where a scheme is not allowed."""

    unit: str
    entries: list[Entry | None]


@dataclass(frozen=True, slots=True)
class TablePage:
    """Some rows of a metric's units × schemes table, as sorted."""

    rows: list[UnitRow]
    sort: str
    number: int
    pages: int
    units: int


def table_page(metric: str, table: SensitivityTable, sort: str, number: int) -> TablePage:
    """The units of a page, in network order or by a scheme, the largest first.

    Raises InvalidRequest for a `sort` that is neither, and for a page that there is not.
    """
    values, units = matrix(table), table["units"]
    pages = max(1, -(-len(units) // ROWS))
    if number > pages:
        raise InvalidRequest(
            f"there is no page {number}", field="page", value=number, accepted=f"1 to {pages}" if pages > 1 else "1"
        )
    order = _order(table, values, sort)[(number - 1) * ROWS : number * ROWS]
    outliers = np.column_stack([stand_out(column) for column in values.T])
    largest = np.nanmax(np.abs(np.nan_to_num(values)), axis=0, initial=0.0)

    def entry(row: int, column: int) -> Entry | None:
        value = values[row, column]
        if np.isnan(value):
            return None
        return Entry(
            sensitivity_text(metric, table, row, column),
            parts_of(metric, table, row, column),
            float(abs(value) / (largest[column] or 1.0)),
            bool(value < 0),
            bool(outliers[row, column]),
        )

    rows = [UnitRow(units[row], [entry(row, column) for column in range(values.shape[1])]) for row in order]
    return TablePage(rows, sort, number, pages, len(units))


def _order(table: SensitivityTable, values: NDArray[np.float64], sort: str) -> list[int]:
    if sort == NETWORK_ORDER:
        return list(range(len(values)))
    if sort not in table["schemes"]:
        raise InvalidRequest(
            f"the table cannot be sorted by '{sort}'",
            field="sort",
            value=sort,
            accepted=[NETWORK_ORDER, *table["schemes"]],
        )
    column = values[:, table["schemes"].index(sort)]
    # NaN, of what is not allowed, comes last.
    return [int(row) for row in np.argsort(-column, kind="stable")]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Spearman's ρ of every two metrics: over all units and schemes, and of the units within a scheme (the mean over
    the schemes). None where too little is shared or one does not vary."""

    metrics: list[str]
    overall: list[list[float | None]]
    within: list[list[float | None]]


def rank_agreement(tables: dict[str, SensitivityTable]) -> Agreement | None:
    """How metrics agree in ranking; None for fewer than two."""
    if len(tables) < 2:
        return None
    names = list(tables)
    long = sensitivity_table(tables)
    by_entry = long.pivot(index=["unit", "scheme"], columns="metric", values="sensitivity")[names]
    by_scheme = [_spearman(group) for _, group in by_entry.groupby(level="scheme")]
    within = np.array([found for found in by_scheme if np.isfinite(found).any()])
    mean = _mean(within) if len(within) else np.full((len(names), len(names)), np.nan)
    return Agreement(names, _optional(_spearman(by_entry)), _optional(mean))


def _spearman(values: pd.DataFrame) -> NDArray[np.float64]:
    return values.corr(method="spearman", min_periods=3).to_numpy()


def _mean(stacked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the first axis, of those that are there."""
    there = np.isfinite(stacked)
    count = there.sum(axis=0)
    total = np.where(there, stacked, 0.0).sum(axis=0)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _optional(values: NDArray[np.float64]) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in values]


@dataclass(frozen=True, slots=True)
class Outlier:
    """A unit that stands out at a scheme by a metric, how many times the median it is, and the further metrics that
    find it at any scheme."""

    unit: str
    scheme: str
    text: str
    times: float
    others: list[str]


def outliers(metric: str, tables: Mapping[str, SensitivityTable]) -> list[Outlier]:
    """The units that stand out by a metric, each at the scheme at which it does most, the farthest first."""
    found = {name: _outstanding(table) for name, table in tables.items()}
    table, schemes = tables[metric], tables[metric]["schemes"]
    values = matrix(table)
    rows = [
        Outlier(
            unit,
            schemes[column],
            value_text(metric, values[table["units"].index(unit), column]),
            times,
            [name for name, units in found.items() if name != metric and unit in units],
        )
        for unit, (column, times) in found[metric].items()
    ]
    return sorted(rows, key=lambda row: -row.times)


def _outstanding(table: SensitivityTable) -> dict[str, tuple[int, float]]:
    """Unit → the column at which it stands out most, and how many times the median it is there."""
    found: dict[str, tuple[int, float]] = {}
    for column, values in enumerate(matrix(table).T):
        for row in np.flatnonzero(stand_out(values)):
            unit, times = table["units"][row], float(times_median(values)[row])
            if unit not in found or times > found[unit][1]:
                found[unit] = column, times
    return found


def matrix(table: SensitivityTable) -> NDArray[np.float64]:
    """Units × schemes, NaN where a scheme is not allowed."""
    values = np.array(table["values"], dtype=float)
    return values.reshape(len(table["units"]), len(table["schemes"]))
