"""Weights of b bits a code, in the order in which a warp's lanes load them as operands of the tensor cores.

A tile of 16 rows × 128 inputs is contiguous: its planes one after the other, of 4, 2, 1 or 8 bits a code. Tiles lie
strip of 16 rows by strip, along the inputs within a strip. Lane 4·g + t owns rows g + 8·p and, of the inputs,
32·(2·C + c) + 8·t + 4·h + j: the A fragment of mma.m16n8k32 with the inputs of each 32 permuted, so that a lane reads
its activations as 8 neighbours. In a plane, the codes that differ only in its folded axes share a byte, and the 32-bit
words lie so that a warp's loads coalesce. `tests/workers/kernels/test_pack.py` spells the layout out byte by byte.

The split into planes is FP6-LLM's (arXiv 2401.14112); the fragment's layout is the PTX ISA's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from search.scheme import Scheme
from workers.kernels.errors import KernelError, check_tensor, refused

WEIGHT_BITS = (3, 4, 5, 6, 8)
ACTIVATION_BITS = (4, 6, 8, 16)
GROUP_SIZES = (None, 32, 64, 128)

ACCEPTED = (
    "w3, w4, w5, w6 or w8 × a4, a6, a8 or a16, symmetric, "
    "one scale per output channel or per group of 32, 64 or 128 inputs"
)

TILE_ROWS, TILE_COLUMNS = 16, 128

ROW_MULTIPLE = 64
"""To how many rows weights are padded: those of one wgmma."""

COLUMN_MULTIPLE = 32
"""Inputs come in multiples of this: the inputs of one integer MMA."""

MOST_COLUMNS = 130_944
"""So many products of −128 by −128 stay below 2^31, where 128 more would leave int32: kernels may sum weights of any
width as the upper bits of a byte, and given codes are not looked at."""

_SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_AXES = "SpgTCcthj"
"""Rows: strip, half, group of lanes. Inputs: tile, half, 32 inputs, lane of four, half of its eight, byte."""


@dataclass(frozen=True, slots=True)
class _Plane:
    """`width` bits of every code; bytes stand in the order of `stored`, `folded` axes share one at `shifts`."""

    width: int
    stored: str
    folded: str
    shifts: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(_AXES.index(axis) for axis in self.stored + self.folded)


_NIBBLES = _Plane(4, "STCgtcpj", "h", (4, 0))
_CRUMBS = _Plane(2, "STgtCcj", "hp", (0, 2, 4, 6))
_BITS = _Plane(1, "STgtCj", "chp", (0, 1, 2, 3, 4, 5, 6, 7))
_BYTES = _Plane(8, "STCcgthpj", "", (0,))

_PLANES = {3: (_CRUMBS, _BITS), 4: (_NIBBLES,), 5: (_NIBBLES, _BITS), 6: (_NIBBLES, _CRUMBS), 8: (_BYTES,)}
"""Of every width of codes, the highest bits first."""


@dataclass(frozen=True, eq=False, slots=True)
class Packed:
    """The weight of `rows` output channels × `columns` inputs in `scheme`, padded with zero codes and zero scales.

    `tiles` is uint8, flat; `scales` is float16, groups × padded rows (one group: per output channel).
    Raises KernelError where they are not of the scheme's and the shape's type and size, which a kernel would overrun.
    """

    scheme: Scheme
    rows: int
    columns: int
    tiles: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check_scheme(self.scheme)
        check_shape(self.scheme, self.rows, self.columns)
        codes = self.rows_padded * self.columns_padded
        check_tensor("tiles", self.tiles, (torch.uint8,), (codes * self.scheme.weight_bits // 8,))
        scales = (self.groups_padded, self.rows_padded)
        check_tensor("scales", self.scales, (torch.float16,), scales, self.tiles.device)

    @property
    def rows_padded(self) -> int:
        """Output channels, to a multiple of 64."""
        return _padded(self.rows, ROW_MULTIPLE)

    @property
    def columns_padded(self) -> int:
        """Inputs, to a multiple of 128."""
        return _padded(self.columns, TILE_COLUMNS)

    @property
    def groups_padded(self) -> int:
        """Groups of the padded inputs; 1 where scales are per output channel."""
        return self.columns_padded // (self.scheme.group_size or self.columns_padded)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.tiles.device

    def to(self, device: torch.device | str) -> Packed:
        """The same weight on another device."""
        return Packed(self.scheme, self.rows, self.columns, self.tiles.to(device), self.scales.to(device))


def pack(codes: Tensor, scales: Tensor, scheme: Scheme) -> Packed:
    """Pack `codes` (int8, N × K, each −2^(b−1) … 2^(b−1)−1) and their `scales` (N × groups, representable in float16).

    Runs where the codes are, with the same bytes everywhere. Raises KernelError naming the field, value and what is
    accepted: another scheme, type, shape or device, a code or scale out of range.
    """
    check_scheme(scheme)
    if codes.ndim != 2:
        raise refused("codes", tuple(codes.shape), "rows × columns")
    rows, columns = codes.shape
    check_shape(scheme, rows, columns)
    check_tensor("codes", codes, (torch.int8,), (rows, columns))
    groups = columns // (scheme.group_size or columns)
    check_tensor("scales", scales, _SCALE_TYPES, (rows, groups), codes.device)
    _check_codes(codes, scheme.weight_bits)
    return Packed(scheme, rows, columns, _tiles(codes, scheme.weight_bits), _stored_scales(scales, scheme, columns))


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """The codes (int8, N × K) and scales (float16, N × groups) that were packed."""
    bits = packed.scheme.weight_bits
    strips, across = packed.rows_padded // TILE_ROWS, packed.columns_padded // TILE_COLUMNS
    tiles = packed.tiles.view(strips, across, -1)
    unsigned = torch.zeros(_split_shape(strips, across), dtype=torch.uint8, device=packed.device)
    start = 0
    for plane in _PLANES[bits]:
        size = TILE_ROWS * TILE_COLUMNS * plane.width // 8
        unsigned = (unsigned << plane.width) | _unfolded(tiles[..., start : start + size], plane)
        start += size
    # Up to the top of the byte and down again, which extends the sign.
    codes = (unsigned << (8 - bits)).view(torch.int8) >> (8 - bits)
    codes = codes.reshape(packed.rows_padded, packed.columns_padded)[: packed.rows, : packed.columns]
    groups = packed.columns // (packed.scheme.group_size or packed.columns)
    return codes.contiguous(), packed.scales[:groups, : packed.rows].T.contiguous()


def check_scheme(scheme: Scheme) -> None:
    """Raise KernelError unless kernels exist for the scheme."""
    if (
        scheme.weight_bits not in WEIGHT_BITS
        or scheme.activation_bits not in ACTIVATION_BITS
        or scheme.group_size not in GROUP_SIZES
        or not scheme.symmetric
    ):
        raise KernelError(f"no kernel multiplies {scheme}", field="scheme", value=str(scheme), accepted=ACCEPTED)


def check_shape(scheme: Scheme, rows: int, columns: int) -> None:
    """Raise KernelError unless a weight of rows × columns can be packed in the scheme."""
    multiple = max(COLUMN_MULTIPLE, scheme.group_size or 0)
    if rows < 1:
        raise refused("rows", rows, "at least 1")
    if columns < 1 or columns % multiple or columns > MOST_COLUMNS:
        raise refused("columns", columns, f"a multiple of {multiple} up to {MOST_COLUMNS}")


def _tiles(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    padding = (0, _padded(columns, TILE_COLUMNS) - columns, 0, _padded(rows, ROW_MULTIPLE) - rows)
    padded = torch.nn.functional.pad(codes, padding).view(torch.uint8)
    strips, across = padded.shape[0] // TILE_ROWS, padded.shape[1] // TILE_COLUMNS
    split = padded.view(_split_shape(strips, across))
    planes, below = [], bits
    for plane in _PLANES[bits]:
        below -= plane.width
        planes.append(_folded(split >> below, plane).view(strips, across, -1))
    return torch.cat(planes, dim=-1).flatten()


def _folded(split: Tensor, plane: _Plane) -> Tensor:
    """The bytes of a plane: of every code the lowest bits, those of the folded axes side by side."""
    fields = (split & (2**plane.width - 1)).permute(plane.order)
    fields = fields.reshape(*fields.shape[: len(plane.stored)], len(plane.shifts))
    # No two fields share a bit, so their sum is their union.
    return torch.bitwise_left_shift(fields, _shifts(plane, split)).sum(-1, dtype=torch.uint8)


def _unfolded(stored: Tensor, plane: _Plane) -> Tensor:
    """Of every code the bits of a plane (strips × tiles × bytes), in the order of `_AXES`."""
    sizes = dict(zip(_AXES, _split_shape(*stored.shape[:2]), strict=True))
    fields = torch.bitwise_right_shift(stored.reshape(-1, 1), _shifts(plane, stored))
    fields = fields.bitwise_and(2**plane.width - 1)
    fields = fields.view([sizes[axis] for axis in plane.stored + plane.folded])
    return fields.permute([(plane.stored + plane.folded).index(axis) for axis in _AXES])


def _split_shape(strips: int, across: int) -> tuple[int, ...]:
    return strips, 2, 8, across, 2, 2, 4, 2, 4


def _shifts(plane: _Plane, like: Tensor) -> Tensor:
    return torch.tensor(plane.shifts, dtype=torch.uint8, device=like.device)


def _stored_scales(scales: Tensor, scheme: Scheme, columns: int) -> Tensor:
    stored = scales.to(torch.float16)
    wrong = ~scales.isfinite() | (scales < 0) | (stored.to(scales.dtype) != scales)
    if wrong.any():
        raise refused("scales", scales[wrong][0].item(), "numbers from 0 to 65504 that float16 represents exactly")
    groups = _padded(columns, TILE_COLUMNS) // scheme.group_size if scheme.group_size else 1
    padding = (0, _padded(len(scales), ROW_MULTIPLE) - len(scales), 0, groups - scales.shape[1])
    return torch.nn.functional.pad(stored.T, padding).contiguous()


def _check_codes(codes: Tensor, bits: int) -> None:
    smallest, greatest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = (int(bound) for bound in torch.aminmax(codes))
    if low < smallest or high > greatest:
        raise refused("codes", low if low < smallest else high, f"{smallest} … {greatest} in {bits} bits")


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
