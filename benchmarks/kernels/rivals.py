"""What else multiplies these shapes: float16 and int8 by torch, int8 by Triton and cuBLASLt, few bits by Humming.

A rival that is not installed, or that refuses, says why; the run goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from benchmarks.kernels import cublaslt
from benchmarks.kernels.timing import Run, Stopwatch, random_codes
from workers.kernels.autotune import graph_microseconds

Rival = Callable[[Stopwatch, int, int, int], list[Run]]
"""Of a stopwatch, tokens, rows and columns: the product with copies of the weight, each run once."""

RIVALS: dict[str, Rival] = {}

BASE = "torch fp16"

INT8 = ("torch int8", "triton int8", "cublaslt int8")
"""Rivals whose weights and activations are int8."""


class Unavailable(Exception):
    """A rival cannot run here."""


def rival(name: str) -> Callable[[Rival], Rival]:
    """Register a rival under `name`."""

    def register(make: Rival) -> Rival:
        RIVALS[name] = make
        return make

    return register


@rival(BASE)
def torch_fp16(watch: Stopwatch, tokens: int, rows: int, columns: int) -> list[Run]:
    """cuBLAS on a float16 weight."""
    x = torch.randn(tokens, columns, dtype=torch.float16, device="cuda")
    weights = [
        torch.randn(rows, columns, dtype=torch.float16, device="cuda") for _ in range(watch.copies(2 * rows * columns))
    ]
    return _run([partial(functional.linear, x, weight) for weight in weights])


@rival("torch int8")
def torch_int8(watch: Stopwatch, tokens: int, rows: int, columns: int) -> list[Run]:
    """`torch._int_mm`: cuBLASLt to int32, without scales."""
    if tokens <= 16:
        raise Unavailable("it takes more than 16 tokens")
    codes = random_codes(tokens, columns)
    weights = [random_codes(rows, columns) for _ in range(watch.copies(rows * columns))]
    return _run([partial(torch._int_mm, codes, weight.t()) for weight in weights])


@rival("triton int8")
def triton_int8(watch: Stopwatch, tokens: int, rows: int, columns: int) -> list[Run]:
    """`tl.dot` to float16 with both scales, the fastest of some tiles."""
    try:
        from benchmarks.kernels import triton_int8 as kernel
    except ImportError as error:
        raise Unavailable(f"Triton cannot be imported: {error}") from error
    codes, scale = random_codes(tokens, columns), torch.rand(tokens, device="cuda") / 127
    weights = [random_codes(rows, columns) for _ in range(watch.copies(rows * columns))]
    scales = torch.rand(rows, device="cuda") / 127
    tried: list[tuple[float, list[Run]]] = []
    failed: list[str] = []
    for config in kernel.configs(tokens):
        runs: list[Run] = [partial(kernel.product, codes, weight, scale, scales, config) for weight in weights]
        try:
            tried.append((graph_microseconds(_run(runs)), runs))
        except Exception as error:  # a tile that this GPU has no room for
            failed.append(f"{config}: {error}")
    if not tried:
        raise Unavailable("; ".join(failed))
    return min(tried, key=lambda one: one[0])[1]


@rival("cublaslt int8")
def cublaslt_int8(watch: Stopwatch, tokens: int, rows: int, columns: int) -> list[Run]:
    """cuBLASLt to int32, without scales, by the fastest of its algorithms."""
    codes = random_codes(tokens, columns)
    weights = [random_codes(rows, columns) for _ in range(watch.copies(rows * columns))]
    try:
        tried = [_run(list(runs)) for runs in cublaslt.products(codes, weights)]
    except cublaslt.CublasLtError as error:
        raise Unavailable(str(error)) from error
    return min(tried, key=graph_microseconds)


def humming(bits: int, activation: str | None) -> Rival:
    """Humming's layer on a weight of so many bits; activations in float16, or rounded as they arrive."""

    def make(watch: Stopwatch, tokens: int, rows: int, columns: int) -> list[Run]:
        try:
            from humming.layer import HummingLayer
        except ImportError as error:
            raise Unavailable(f"humming-kernels cannot be imported: {error}") from error
        x = torch.randn(tokens, columns, dtype=torch.float16, device="cuda")
        layers = []
        for _ in range(watch.copies(rows * columns * bits // 8)):
            layer = HummingLayer(
                shape_n=rows,
                shape_k=columns,
                weight_config={"dtype": f"int{bits}"},
                input_config={"dtype": activation} if activation else None,
                torch_dtype=torch.float16,
            ).cuda()
            layer.load_from_unquantized(torch.randn(rows, columns, dtype=torch.float16, device="cuda"))
            layer.transform()
            layers.append(layer)
        return _run([partial(layer, x) for layer in layers])

    return make


RIVALS |= {
    "humming w6a16": humming(6, None),
    "humming w4a16": humming(4, None),
    "humming w6a8": humming(6, "int8"),
    "humming w4a8": humming(4, "int8"),
}


def _run(runs: list[Run]) -> list[Run]:
    """Once each, so that what is compiled or set up at first use is."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    return runs
