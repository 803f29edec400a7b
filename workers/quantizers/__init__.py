"""Quantizers: methods that choose the grid to which a weight is rounded. One file each; a registry finds them by name.

A quantizer is called with the weight as rows × groups × group size (float) and its scheme, and returns a `Grid`.
"""

from workers.quantizers import mse, rtn
from workers.quantizers.grid import QUANTIZERS, Grid, choose_grid, codes_on_grid, round_to_grid

__all__ = ["QUANTIZERS", "Grid", "choose_grid", "codes_on_grid", "mse", "round_to_grid", "rtn"]
