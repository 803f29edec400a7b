"""Which kernel multiplies a shape, and how the inputs are cut for it: the plan to begin with, and the others to time.

Sums of integers are exact, so their plans differ in time alone. Sums of floats are rounded: how their inputs are cut
among slices and warps is settled by the weight's shape and the GPU, never by timing, and one weight gives a token the
same result in every decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from search.scheme import Scheme
from workers.kernels import catalogue
from workers.kernels.catalogue import HOPPER, Decode, Kernel, Prefill
from workers.kernels.pack import ROW_MULTIPLE, TILE_COLUMNS, TILE_ROWS

MOST_PER_DECODE = 32
"""Tokens that one decode kernel takes; more are multiplied in several launches."""

MOST_DECODED_CODES, MOST_DECODED_FLOATS = 32, 64
"""Up to so many tokens a decode kernel multiplies; 16-bit tokens longer, as prefill writes the whole weight out."""

STATIC_SHARED = 48 * 1024
"""Bytes of shared memory that a decode kernel may declare."""

_WARPS_EACH = 12
"""Warps per multiprocessor that keep enough loads under way to fill the memory's bandwidth."""

_WARPS, _STRIPS, _TOKEN_TILES = (4, 8), (1, 2), (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU as far as plans depend on it: `architecture` as NVRTC names it, `driver` as an integer (13000 for 13.0)."""

    name: str
    driver: int
    architecture: str
    multiprocessors: int


@dataclass(frozen=True, slots=True)
class Problem:
    """`tokens` × columns by a weight of rows × columns, with results in `dtype`, which 16-bit tokens have too."""

    machine: Machine
    scheme: Scheme
    rows: int
    columns: int
    tokens: int
    dtype: torch.dtype

    @property
    def exact(self) -> bool:
        """Whether all sums are of integers."""
        return self.scheme.quantizes_activations and self.scheme.group_size is None

    @property
    def decodes(self) -> bool:
        """Whether a decode kernel multiplies it."""
        return self.tokens <= (MOST_DECODED_CODES if self.scheme.quantizes_activations else MOST_DECODED_FLOATS)


@dataclass(frozen=True, slots=True)
class Plan:
    """A kernel (`dequantise`: a matrix product by torch follows) and into how many slices a decode cuts the inputs."""

    kernel: Kernel
    slices: int = 1


def bucket(tokens: int) -> int:
    """The power of two that numbers of tokens share a plan under: the next one up."""
    return 1 << (tokens - 1).bit_length()


def default(problem: Problem) -> Plan:
    """The plan that needs no timing."""
    return candidates(problem)[0]


def candidates(problem: Problem) -> tuple[Plan, ...]:
    """At most 12 plans that give the same results bit for bit, the default first."""
    if problem.decodes:
        return _decodes(problem)
    if not problem.scheme.quantizes_activations:
        return (Plan(catalogue.dequantise(problem.scheme, problem.dtype)),)
    return tuple(Plan(_prefill(problem, tile_tokens)) for tile_tokens in _tiles_of_tokens(problem))


def split(rows: int, columns: int, multiprocessors: int) -> tuple[int, int]:
    """Into how many slices, and those into how many warps' parts, inputs are cut: (slices, warps).

    As few slices, and then as few warps, as keep all multiprocessors loading; each warp at least two tiles, where there
    are so many.
    """
    strips, tiles = _padded(rows, ROW_MULTIPLE) // TILE_ROWS, _padded(columns, TILE_COLUMNS) // TILE_COLUMNS
    least, most = _WARPS
    wanted = _WARPS_EACH * multiprocessors
    slices = max(1, min(round(wanted / (strips * most)), tiles // (2 * least)))
    enough = least * strips * slices >= wanted or 2 * most * slices > tiles
    return slices, least if enough else most


def shared_bytes(kernel: Decode) -> int:
    """What a decode kernel declares for the sums of its warps, each row padded by four."""
    return kernel.warps * 8 * kernel.token_tiles * (TILE_ROWS * kernel.strips + 4) * 4


def _decodes(problem: Problem) -> tuple[Plan, ...]:
    slices, warps = split(problem.rows, problem.columns, problem.machine.multiprocessors)
    tiles = _padded(problem.columns, TILE_COLUMNS) // TILE_COLUMNS
    # Several strips share what they read of the tokens, which matters where those are many.
    strips = 2 if problem.tokens > 16 else 1
    shapes = {(strips, warps, slices): None, (1, warps, slices): None}
    if problem.exact:
        others = ((s, w, n) for s in _STRIPS for w in _WARPS for n in (1, slices, 2 * slices))
        shapes |= {shape: None for shape in others if shape[1] * shape[2] <= max(tiles, _WARPS[0])}
    else:
        shapes |= {(strips, warps, slices): None for strips in _STRIPS}
    kernels = [(_decode(problem, strips, warps), slices) for strips, warps, slices in shapes]
    return tuple(Plan(kernel, slices) for kernel, slices in kernels if shared_bytes(kernel) <= STATIC_SHARED)


def _decode(problem: Problem, strips: int, warps: int) -> Decode:
    eights = -(-min(problem.tokens, MOST_PER_DECODE) // 8)
    token_tiles = next(count for count in _TOKEN_TILES if count >= eights)
    inputs = torch.int8 if problem.scheme.quantizes_activations else problem.dtype
    return catalogue.decode(problem.scheme, inputs, problem.dtype, strips, warps, token_tiles)


def _tiles_of_tokens(problem: Problem) -> tuple[int, ...]:
    if problem.machine.architecture != HOPPER or problem.scheme.group_size is not None:
        return (128,)
    # Weights are unpacked once a tile, so the larger is better while there are tiles for all multiprocessors.
    tiles = -(-problem.rows // 128) * -(-problem.tokens // 256)
    return (256, 128) if tiles >= problem.machine.multiprocessors else (128, 256)


def _prefill(problem: Problem, tile_tokens: int) -> Prefill:
    return catalogue.prefill(problem.scheme, problem.machine.architecture, problem.dtype, tile_tokens)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
