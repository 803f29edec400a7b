"""The sensitivity tables of a search, as the worker stored them."""

from __future__ import annotations

from typing import Any

import pandas as pd
from sqlalchemy import Engine

from db.results import get_results
from db.searches import Search


def read_sensitivities(engine: Engine, search: Search, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Metric → its table, for the metrics that have finished (or `only` that one), in the order of the request."""
    stored: dict[str, str] = (search.summary or {}).get("tables") or {}
    wanted = [metric for metric in search.request["sensitivity"] if only in (None, metric)]
    keys = {metric: stored[metric] for metric in wanted if metric in stored}
    values = get_results(engine, list(keys.values()))
    return {metric: values[key].value for metric, key in keys.items() if key in values}


def sensitivity_table(tables: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """All tables in one: a row per metric, unit and allowed scheme, with both parts of the sensitivity."""
    parts = ("values", "weight", "activation", "stderr")
    rows = [
        (metric, unit, scheme, *cell)
        for metric, table in tables.items()
        for unit, *cells in zip(table["units"], *(table[part] for part in parts), strict=True)
        for scheme, *cell in zip(table["schemes"], *cells, strict=True)
        if cell[0] is not None
    ]
    columns = ["metric", "unit", "scheme", "sensitivity", "weight_part", "activation_part", "stderr"]
    return pd.DataFrame(rows, columns=columns)
