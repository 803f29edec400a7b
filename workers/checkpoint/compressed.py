"""One layer's weight as compressed-tensors stores it, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from search.errors import BitfrontierError
from search.scheme import SCALE_BITS, Scheme
from workers.checkpoint.packing import WORD_BITS, pack, unpack, words_of
from workers.quantizers import Grid, codes_on_grid

PACKED = "pack-quantized"
INTEGERS = "int-quantized"
FORMATS = (PACKED, INTEGERS)

WEIGHT, SCALE, SHAPE = "weight", "weight_scale", "weight_shape"
PACKED_WEIGHT, PACKED_ZERO_POINT = "weight_packed", "weight_zero_point"

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""What a tensor is called after its module → its type and shape."""


class DamagedCheckpoint(BitfrontierError):
    """What was written is not what was to be written."""

    type = "damaged-checkpoint"
    title = "The checkpoint is not what it should be"


def layout(rows: int, columns: int, scheme: Scheme, format: str) -> Layout:
    """The tensors that store a rows × columns weight."""
    groups = columns // scheme.group_size if scheme.group_size else 1
    found: Layout = {SCALE: (torch.float16, (rows, groups))}
    if format == INTEGERS:
        return found | {WEIGHT: (torch.int8, (rows, columns))}
    found |= {
        PACKED_WEIGHT: (torch.int32, (rows, words_of(columns, scheme.weight_bits))),
        SHAPE: (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        found[PACKED_ZERO_POINT] = (torch.int32, (words_of(rows, scheme.weight_bits), groups))
    return found


def padding_bytes(rows: int, columns: int, scheme: Scheme, format: str) -> float:
    """How many bytes of codes and zero points hold nothing, because rows are whole words."""
    if format == INTEGERS:
        return 0.0
    bits = scheme.weight_bits
    unused = rows * (words_of(columns, bits) * WORD_BITS - columns * bits)
    if not scheme.symmetric:
        groups = columns // scheme.group_size if scheme.group_size else 1
        unused += groups * (words_of(rows, bits) * WORD_BITS - rows * bits)
    return unused / 8


def compress(matrix: Tensor, scheme: Scheme, grid: Grid, format: str) -> dict[str, Tensor]:
    """The tensors of `layout` for a rows × columns weight that is rounded to `grid`.

    Raises DamagedCheckpoint where they do not stand for the codes of that weight, or for its scales.
    """
    codes = codes_on_grid(matrix, grid, scheme).cpu()
    scale = grid.scale.squeeze(-1).to(torch.float16).cpu()
    found = {SCALE: scale}
    if format == INTEGERS:
        found[WEIGHT] = codes
    else:
        found |= {PACKED_WEIGHT: _packed(codes, scheme), SHAPE: torch.tensor(matrix.shape)}
        if grid.zero_point is not None:
            zero_point = grid.zero_point.squeeze(-1).to(torch.int8).cpu()
            found[PACKED_ZERO_POINT] = _packed(zero_point.T, scheme).T.contiguous()
    read, zero_points = stored_codes(found, scheme)
    exact = torch.equal(read, codes) and torch.equal(scale.float(), grid.scale.squeeze(-1).float().cpu())
    if grid.zero_point is not None:
        exact = exact and zero_points is not None and torch.equal(zero_points, zero_point)
    if not exact:
        raise DamagedCheckpoint(f"packing a weight of {scheme} did not keep its codes and {SCALE_BITS}-bit scales")
    return found


def decompress(tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """The rows × columns weight that tensors of `layout` stand for; float32, exactly."""
    codes, zero_points = stored_codes(tensors, scheme)
    scale = tensors[SCALE].float()
    grouped = codes.float().view(*scale.shape, -1)
    if zero_points is not None:
        grouped -= zero_points.float().unsqueeze(-1)
    return grouped.mul_(scale.unsqueeze(-1)).view(codes.shape)


def stored_codes(tensors: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """The codes, rows × columns, and the zero points, rows × groups, where the scheme has some; int8."""
    if WEIGHT in tensors:
        return tensors[WEIGHT], None
    rows, columns = tensors[SHAPE].tolist()
    codes = _unpacked(tensors[PACKED_WEIGHT], scheme, columns)
    if scheme.symmetric:
        return codes, None
    return codes, _unpacked(tensors[PACKED_ZERO_POINT].T, scheme, rows).T


def _packed(codes: Tensor, scheme: Scheme) -> Tensor:
    return torch.from_numpy(pack(codes.contiguous().numpy(), scheme.weight_bits))


def _unpacked(words: Tensor, scheme: Scheme, columns: int) -> Tensor:
    return torch.from_numpy(unpack(words.contiguous().numpy(), scheme.weight_bits, columns))
