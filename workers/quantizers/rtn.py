"""Round to nearest: the grid spans each group's extremes."""

from __future__ import annotations

from torch import Tensor

from search.scheme import Scheme
from workers.quantizers.grid import Grid, grid_between, quantizer


@quantizer("rtn")
def rtn(grouped: Tensor, scheme: Scheme) -> Grid:
    """The min-max grid of each group."""
    return grid_between(grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True), scheme)
