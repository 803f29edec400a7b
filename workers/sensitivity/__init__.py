"""Sensitivities: predicted loss increases, one file per metric; a registry finds them by name."""

from workers.sensitivity import (
    autoscheme,
    fisher,
    gauss_newton,
    gradient,
    hessian_trace,
    hessian_trace_labels,
    higgs,
    kl,
    lrp,
    pqi,
    size,
    weight_mse,
)
from workers.sensitivity.table import FILLS, Entry, Fill, Subject, Table

__all__ = [
    "FILLS",
    "Entry",
    "Fill",
    "Subject",
    "Table",
    "autoscheme",
    "fisher",
    "gauss_newton",
    "gradient",
    "hessian_trace",
    "hessian_trace_labels",
    "higgs",
    "kl",
    "lrp",
    "pqi",
    "size",
    "weight_mse",
]
