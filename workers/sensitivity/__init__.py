"""Sensitivities: predicted loss increases, one file per metric; a registry finds them by name."""

from workers.sensitivity import hessian_trace, kl
from workers.sensitivity.table import FILLS, Entry, Fill, Subject, Table

__all__ = ["FILLS", "Entry", "Fill", "Subject", "Table", "hessian_trace", "kl"]
