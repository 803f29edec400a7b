"""The kernels that exist: for each instantiation of a template, its text, and how it is launched. Plain data; no GPU.

A kernel's parameters are pointers and 32-bit integers, in the order of `parameters`; the headers say what they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from search.scheme import Scheme
from workers.kernels.compile import ARCHITECTURES
from workers.kernels.errors import refused
from workers.kernels.pack import ROW_MULTIPLE, TILE_COLUMNS, TILE_ROWS, check_scheme

C_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "float", torch.int8: "signed char"}

HOPPER = "sm_90a"
NATIVE_INT4 = ("sm_80", "sm_86", "sm_89")
"""Where int4 MMAs are instructions; on sm_90 they are emulated."""

HOPPER_SHARED, LEAST_SHARED = 227 * 1024, 99 * 1024
"""Bytes of shared memory that a CTA may have on sm_90, and on every architecture (sm_86 and sm_89 have least)."""

QUANTISE_THREADS = 256
DEQUANTISE_WARPS = 4


@dataclass(frozen=True, slots=True)
class Kernel:
    """An instantiation of `template` for `parameters`; `shared_bytes` are given at launch."""

    name: str
    header: str
    template: str
    parameters: tuple[str, ...]
    threads: int
    shared_bytes: int = 0
    checks: str = ""

    @property
    def text(self) -> str:
        """The kernel's definition, for a program that includes its header."""
        parameters = ", ".join(self.parameters)
        arguments = ", ".join(parameter.rpartition(" ")[2] for parameter in self.parameters)
        return (
            f'extern "C" __global__ void __launch_bounds__({self.threads}, 1) {self.name}({parameters}) '
            f"{{ {self.checks}{self.template}({arguments}); }}"
        )


@dataclass(frozen=True, slots=True)
class Prefill(Kernel):
    """A CTA computes tiles of `tile_rows` × `tile_tokens`; activations lie in `layout`, tokens padded to `multiple`."""

    layout: str = "TILES"
    multiple: int = 8
    tile_rows: int = 128
    tile_tokens: int = 128
    persistent: bool = False

    def blocks(self, rows: int, tokens: int, multiprocessors: int) -> tuple[int, int]:
        """The grid: a CTA for each tile, or for each multiprocessor, where it walks the tiles."""
        tiles = -(-rows // self.tile_rows) * -(-tokens // self.tile_tokens)
        return min(tiles, multiprocessors) if self.persistent else tiles, 1


@dataclass(frozen=True, slots=True)
class Decode(Kernel):
    """A CTA computes 16 · `strips` rows of 8 · `token_tiles` tokens; its `warps` and the slices split the inputs."""

    strips: int = 1
    warps: int = 4
    token_tiles: int = 1

    def blocks(self, rows: int, slices: int) -> tuple[int, int]:
        """The grid: strips of the padded rows × slices of the inputs."""
        return _padded(rows, ROW_MULTIPLE) // (TILE_ROWS * self.strips), slices


def program(kernels: Iterable[Kernel]) -> str:
    """The text of a program with these kernels."""
    kernels = list(kernels)
    headers = dict.fromkeys(f'#include "{kernel.header}"' for kernel in kernels)
    return "\n".join([*headers, *(kernel.text for kernel in kernels), ""])


def prefill(scheme: Scheme, architecture: str, out: torch.dtype, tile_tokens: int = 128) -> Prefill:
    """The kernel for many tokens with integer activations.

    Takes codes as TILES, or as NIBBLES where int4 is native. `tile_tokens` of 256 is for sm_90a and scales per output
    channel only. Raises KernelError for another scheme, architecture or width.
    """
    check_scheme(scheme)
    if not scheme.quantizes_activations:
        raise refused("scheme", str(scheme), "activations of 4, 6 or 8 bits; for 16, dequantise and multiply")
    if architecture not in ARCHITECTURES:
        raise refused("architecture", architecture, ARCHITECTURES)
    if tile_tokens not in (128, 256 if architecture == HOPPER and scheme.group_size is None else 128):
        raise refused("tile_tokens", tile_tokens, "128, or on sm_90a with scales per output channel 256")
    if architecture == HOPPER:
        return _prefill_wgmma(scheme, out, tile_tokens)
    native = architecture in NATIVE_INT4 and (scheme.weight_bits, scheme.activation_bits) == (4, 4)
    return _prefill_mma(scheme, out, native and scheme.group_size != 32)


def decode(
    scheme: Scheme, inputs: torch.dtype, out: torch.dtype, strips: int = 1, warps: int = 4, token_tiles: int = 1
) -> Decode:
    """The kernel for a few tokens: `inputs` is int8 for codes (layout ROWS), else the 16-bit float they are."""
    check_scheme(scheme)
    shape = f"{scheme.weight_bits}, {scheme.group_size or 0}, {strips}, {warps}, {token_tiles}"
    return Decode(
        name=_name("decode", scheme, inputs, out, strips, warps, token_tiles),
        header="decode.cuh",
        template=f"decode<{shape}, {C_TYPES[inputs]}, {C_TYPES[out]}>",
        parameters=(
            "const unsigned char* tiles",
            "const f16* scales",
            f"const {C_TYPES[inputs]}* x",
            "const float* token_scales",
            "const float* bias",
            f"{C_TYPES[out]}* y",
            "void* partial",
            "unsigned* tickets",
            "int tokens",
            "int rows",
            "int inputs",
        ),
        threads=32 * warps,
        strips=strips,
        warps=warps,
        token_tiles=token_tiles,
    )


def quantise(layout: str, inputs: torch.dtype) -> Kernel:
    """Activations to codes in ROWS, TILES or NIBBLES. Grid: padded tokens × 1."""
    return Kernel(
        name=f"quantise_{layout.lower()}_{_short(inputs)}",
        header="quantise.cuh",
        template=f"quantise<{layout}, {QUANTISE_THREADS}>",
        parameters=(
            f"const {C_TYPES[inputs]}* x",
            "unsigned char* codes",
            "float* scales",
            "int tokens",
            "int inputs",
            "int most",
        ),
        threads=QUANTISE_THREADS,
    )


def dequantise(scheme: Scheme, out: torch.dtype) -> Kernel:
    """Packed weights to a 16-bit matrix. Grid: padded inputs / 128 × padded rows / (16 · DEQUANTISE_WARPS)."""
    check_scheme(scheme)
    shape = f"{scheme.weight_bits}, {scheme.group_size or 0}, {DEQUANTISE_WARPS}"
    return Kernel(
        name=_name("dequantise", scheme, out),
        header="dequantise.cuh",
        template=f"dequantise<{shape}>",
        parameters=(
            "const unsigned char* tiles",
            "const f16* scales",
            f"{C_TYPES[out]}* weight",
            "int rows",
            "int inputs",
        ),
        threads=32 * DEQUANTISE_WARPS,
    )


def _prefill_wgmma(scheme: Scheme, out: torch.dtype, tile_tokens: int) -> Prefill:
    stage_bytes = _padded(TILE_COLUMNS * (tile_tokens + TILE_ROWS * scheme.weight_bits) + _scale_bytes(scheme), 1024)
    # Each of 8 warps turns 64 tokens × 16 rows, or 32 of float32, padded by 16 bytes a token.
    turn_bytes = 8 * (64 if out.itemsize == 2 else 32) * 16 * (out.itemsize + 1)
    stages = min((HOPPER_SHARED - turn_bytes) // (stage_bytes + 16), 6)
    kind = f"{scheme.weight_bits}, {scheme.group_size or 0}, {tile_tokens}, {stages}, {C_TYPES[out]}"
    shared_bytes, threads = stages * (stage_bytes + 16) + turn_bytes, 384
    return Prefill(
        name=_name("prefill_wgmma", scheme, out, tile_tokens),
        header="prefill_wgmma.cuh",
        template=f"prefill_wgmma<{kind}>",
        parameters=_prefill_parameters(out),
        threads=threads,
        shared_bytes=shared_bytes,
        checks=_checks(f"PrefillWgmma<{kind}>", threads, shared_bytes),
        tile_tokens=tile_tokens,
        persistent=True,
    )


def _prefill_mma(scheme: Scheme, out: torch.dtype, native: bool) -> Prefill:
    codes = TILE_COLUMNS // 2 if native else TILE_COLUMNS
    stage_bytes = 128 * codes + TILE_COLUMNS * TILE_ROWS * scheme.weight_bits + _scale_bytes(scheme)
    stages = min(LEAST_SHARED // stage_bytes, 4)
    mma = "Int4" if native else f"Int8<{scheme.weight_bits}>"
    kind = f"{mma}, {scheme.weight_bits}, {scheme.group_size or 0}, {stages}, {C_TYPES[out]}"
    shared_bytes, threads = stages * stage_bytes, 256
    return Prefill(
        name=_name("prefill_int4" if native else "prefill_int8", scheme, out),
        header="prefill_mma.cuh",
        template=f"prefill_mma<{kind}>",
        parameters=_prefill_parameters(out),
        threads=threads,
        shared_bytes=shared_bytes,
        checks=_checks(f"PrefillMma<{kind}>", threads, shared_bytes),
        layout="NIBBLES" if native else "TILES",
        multiple=1 if native else 8,
    )


def _scale_bytes(scheme: Scheme) -> int:
    """Of the groups' scales for 128 rows × 128 inputs."""
    return 128 * 2 * TILE_COLUMNS // scheme.group_size if scheme.group_size else 0


def _prefill_parameters(out: torch.dtype) -> tuple[str, ...]:
    return (
        "const unsigned char* weights",
        "const f16* scales",
        "const unsigned char* codes",
        "const float* token_scales",
        "const float* bias",
        f"{C_TYPES[out]}* y",
        "int rows",
        "int inputs",
        "int tokens",
        "int tokens_padded",
    )


def _checks(kind: str, threads: int, shared_bytes: int) -> str:
    """That the text agrees about what it is launched with."""
    return f"static_assert({kind}::THREADS == {threads} && {kind}::SHARED_BYTES == {shared_bytes}); "


def _name(kernel: str, scheme: Scheme, *parts: torch.dtype | int) -> str:
    words = (_short(part) if isinstance(part, torch.dtype) else str(part) for part in parts)
    return "_".join([kernel, f"w{scheme.weight_bits}g{scheme.group_size or 0}", *words])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
