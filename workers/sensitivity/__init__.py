"""Sensitivities: predicted loss increases, one file per metric; a registry finds them by name."""

from workers.sensitivity import hessian_trace, kl
from workers.sensitivity.table import METRICS, Metric, Table

__all__ = ["METRICS", "Metric", "Table", "hessian_trace", "kl"]
