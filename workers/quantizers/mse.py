"""Clip search: the range of each group is shrunk to where its squared rounding error is least."""

from __future__ import annotations

import torch
from torch import Tensor

from search.scheme import Scheme
from workers.quantizers.grid import Grid, grid_between, quantizer, round_groups

SHRINKS = tuple(1.0 - 0.025 * step for step in range(29))
"""Fractions of the min-max range that are tried: 1.0 down to 0.3."""


@quantizer("mse")
def mse(grouped: Tensor, scheme: Scheme) -> Grid:
    """The grid among shrunk min-max ranges that minimises Σ(w − Q(w))² of each group; never worse than `rtn`."""
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    best = grid_between(low, high, scheme)
    scale, zero_point = best.scale, best.zero_point
    least = _squared_error(grouped, best, scheme)
    for shrink in SHRINKS[1:]:
        grid = grid_between(low * shrink, high * shrink, scheme)
        error = _squared_error(grouped, grid, scheme)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, grid.scale, scale)
        if zero_point is not None and grid.zero_point is not None:
            zero_point = torch.where(better, grid.zero_point, zero_point)
    return Grid(scale, zero_point)


def _squared_error(grouped: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    return round_groups(grouped, grid, scheme.weight_bits).sub_(grouped).square_().sum(-1, keepdim=True)
