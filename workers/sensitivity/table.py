"""The protocol of a metric: it fills a units × schemes table of predicted losses with standard errors.

What a metric says, needs and costs is in `search.metrics`; here is how it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.scheme import Scheme
from search.space import Space, Unit
from workers.tasks import Compute

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Subject:
    """What a metric is asked about: a space, the samples in each calibration batch, and the metrics of the search.

    Metrics that share a pass compute for all of the `requested` ones at once.
    """

    space: Space
    batch_sizes: tuple[int, ...]
    requested: frozenset[str] = frozenset()


class Entry(NamedTuple):
    """Predicted loss increase by rounding weights and by rounding activations, and the variance of their sum."""

    weight: float
    activation: float = 0.0
    variance: float = 0.0


@dataclass(frozen=True, slots=True)
class Table:
    """Predicted loss increases, units × schemes (by name): inf where a scheme is not allowed.

    `weight` and `activation` are what rounding weights and activations contribute, `stderr` the standard error of their
    sum. `details` is what else the metric found (plain JSON), `notes` what a person should know.
    """

    weight: pd.DataFrame
    activation: pd.DataFrame
    stderr: pd.DataFrame
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> pd.DataFrame:
        """The predicted loss increase."""
        return self.weight + self.activation

    @classmethod
    def of(
        cls,
        space: Space,
        entry: Callable[[Unit, Scheme], Entry],
        details: dict[str, Any] | None = None,
        notes: Iterable[str] = (),
    ) -> Table:
        """A table of the entries of all allowed choices."""
        parts = np.full((3, *space.allowed.shape), np.inf)
        for row, unit in enumerate(space.units):
            for column, scheme in enumerate(space.schemes):
                if space.allowed[row, column]:
                    weight, activation, variance = entry(unit, scheme)
                    parts[:, row, column] = weight, activation, np.sqrt(variance)
        weights, activations, errors = (frame(space, part) for part in parts)
        return cls(weights, activations, errors, details or {}, tuple(notes))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON: units, schemes, and tables in which null stands for what is not allowed."""
        return {
            "units": list(self.weight.index),
            "schemes": list(self.weight.columns),
            "values": _plain(self.values),
            "stderr": _plain(self.stderr),
            "weight": _plain(self.weight),
            "activation": _plain(self.activation),
            "details": self.details,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Table:
        """The inverse of `to_json`."""
        index = pd.Index(document["units"], name="unit")
        columns = pd.Index(document["schemes"], name="scheme")
        weight, activation, stderr = (
            pd.DataFrame(document[part], index, columns, dtype=float).fillna(np.inf)
            for part in ("weight", "activation", "stderr")
        )
        return cls(weight, activation, stderr, document["details"], tuple(document["notes"]))


def variance_of_mean(estimates: Array, weights: Array) -> Array:
    """Of the weighted mean of independent estimates (rows); 0 for a single one, of which nothing is known."""
    count, shares = len(estimates), weights / weights.sum()
    deviations = estimates - shares @ estimates
    return np.asarray(shares**2 @ deviations**2 * count / max(count - 1, 1))


def sum_of_layers(entry: Callable[[str, Scheme], Entry]) -> Callable[[Unit, Scheme], Entry]:
    """The entry of a unit as the sum of its layers' (by name).

    Layers are measured on the same samples, so that their errors may go together: added up, they are an upper bound.
    """

    def of_unit(unit: Unit, scheme: Scheme) -> Entry:
        weights, activations, variances = zip(*(entry(layer.name, scheme) for layer in unit.layers), strict=True)
        return Entry(sum(weights), sum(activations), sum(variance**0.5 for variance in variances) ** 2)

    return of_unit


def frame(space: Space, values: Any) -> pd.DataFrame:
    """Units × schemes numbers with their names."""
    return pd.DataFrame(
        values,
        pd.Index([unit.name for unit in space.units], name="unit"),
        pd.Index([str(scheme) for scheme in space.schemes], name="scheme"),
    )


def _plain(table: pd.DataFrame) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in table.to_numpy()]


Fill = Callable[[Compute, Subject], Table]
"""Fills the table of a subject."""

FILLS: dict[str, Fill] = {}
"""By the metric's name."""


def metric(name: str) -> Callable[[Fill], Fill]:
    """Register how the metric `name` of `search.metrics` is computed."""

    def register(function: Fill) -> Fill:
        FILLS[name] = function
        return function

    return register
