"""The integer grid of a scheme: codes from −2^(b−1) to 2^(b−1)−1, one 16-bit scale (and zero point) per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from search.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Grid:
    """`scale` and `zero_point` are rows × groups × 1; a code q stands for (q − zero_point)·scale.

    The zero point of a symmetric scheme is None (0).
    """

    scale: Tensor
    zero_point: Tensor | None = None


Quantizer = Callable[[Tensor, Scheme], Grid]

QUANTIZERS: dict[str, Quantizer] = {}

SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16, a subnormal."""


def quantizer(name: str) -> Callable[[Quantizer], Quantizer]:
    """Register a quantizer under `name`."""

    def register(function: Quantizer) -> Quantizer:
        QUANTIZERS[name] = function
        return function

    return register


def choose_grid(matrix: Tensor, scheme: Scheme, quantizer: str) -> Grid:
    """The grid that the named quantizer chooses for a rows × columns weight."""
    return QUANTIZERS[quantizer](_grouped(matrix, scheme).float(), scheme)


def round_to_grid(matrix: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """The rows × columns weight that `scheme` stores: rounded to `grid`, in the weight's own type."""
    grouped = _grouped(matrix, scheme).float()
    return round_groups(grouped, grid, scheme.weight_bits).reshape(matrix.shape).to(matrix.dtype)


def codes_on_grid(matrix: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """The codes of what `round_to_grid` gives: rows × columns, int8."""
    codes = _group_codes(_grouped(matrix, scheme).float(), grid, scheme.weight_bits)
    return codes.reshape(matrix.shape).to(torch.int8)


def round_groups(grouped: Tensor, grid: Grid, bits: int) -> Tensor:
    """Round rows × groups × size values to the nearest point of the grid."""
    codes = _group_codes(grouped, grid, bits)
    return (codes if grid.zero_point is None else codes.sub_(grid.zero_point)).mul_(grid.scale)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and greatest code: two's complement."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def grid_between(low: Tensor, high: Tensor, scheme: Scheme) -> Grid:
    """The grid that covers [low, high] per group (both rows × groups × 1).

    Symmetric: the scale is max(|low|, |high|) / ((2^b − 1)/2), as compressed-tensors' min-max observer takes it.
    Asymmetric: the range always includes zero, which has a code of its own.
    """
    smallest, greatest = code_range(scheme.weight_bits)
    steps = greatest - smallest
    if scheme.symmetric:
        return Grid(_stored(torch.maximum(low.abs(), high.abs()) / (steps / 2)))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _stored((high - low) / steps)
    zero_point = (smallest - low / scale).round().clamp_(smallest, greatest)
    return Grid(scale, zero_point)


def _stored(scale: Tensor) -> Tensor:
    """As a checkpoint keeps it, in 16 bits; a group of zeros takes the smallest scale."""
    return scale.clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max).to(torch.float16).float()


def _group_codes(grouped: Tensor, grid: Grid, bits: int) -> Tensor:
    codes = (grouped / grid.scale).round_()
    if grid.zero_point is not None:
        codes.add_(grid.zero_point)
    return codes.clamp_(*code_range(bits))


def _grouped(matrix: Tensor, scheme: Scheme) -> Tensor:
    return matrix.reshape(matrix.shape[0], -1, scheme.group_size or matrix.shape[1])
