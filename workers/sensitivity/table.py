"""The protocol of a metric: it fills a units × schemes table with standard errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.space import Space
from workers.tasks import Compute


@dataclass(frozen=True, slots=True)
class Table:
    """Predicted loss increase and its standard error, units × schemes; inf where a scheme is not allowed."""

    values: NDArray[np.float64]
    stderr: NDArray[np.float64]
    details: dict[str, Any] = field(default_factory=dict)


Metric = Callable[[Compute, Space, list[int]], Table]
"""Fills the table of a space from calibration batches of the given sizes."""

METRICS: dict[str, Metric] = {}


def metric(name: str) -> Callable[[Metric], Metric]:
    """Register a metric under `name`."""

    def register(function: Metric) -> Metric:
        METRICS[name] = function
        return function

    return register
