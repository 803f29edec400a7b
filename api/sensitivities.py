"""The sensitivity tables of a search, as the worker stored them."""

from __future__ import annotations

from typing import Any

import pandas as pd
from sqlalchemy import Engine

from db.results import get_results
from db.searches import Search


def read_sensitivities(engine: Engine, search: Search) -> dict[str, dict[str, Any]]:
    """Metric → its table, for the metrics that have finished, in the order of the request."""
    stored: dict[str, str] = (search.summary or {}).get("tables") or {}
    keys = {metric: stored[metric] for metric in search.request["sensitivity"] if metric in stored}
    values = get_results(engine, list(keys.values()))
    return {metric: values[key] for metric, key in keys.items() if key in values}


def sensitivity_table(tables: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """All tables in one: metric, unit, scheme, sensitivity, standard error; only what is allowed."""
    rows = [
        (metric, unit, scheme, value, error)
        for metric, table in tables.items()
        for unit, values, errors in zip(table["units"], table["values"], table["stderr"], strict=True)
        for scheme, value, error in zip(table["schemes"], values, errors, strict=True)
        if value is not None
    ]
    return pd.DataFrame(rows, columns=["metric", "unit", "scheme", "sensitivity", "stderr"])
