"""cuBLASLt's int8 product by its C interface: the library that torch has loaded, with a workspace and all algorithms.

`torch._int_mm` gives it neither; nvmath-python 1.0 knows no int8.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p, sizeof
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")

WORKSPACE_BYTES = 32 * 2**20

MOST_ALGORITHMS = 16

# cublasLt.h, cublas_api.h and library_types.h.
_COMPUTE_32I, _R_8I, _R_32I = 72, 3, 10
_TRANSA, _TRANSPOSED = 3, 1
_MAX_WORKSPACE_BYTES = 1


class CublasLtError(Exception):
    """cuBLASLt is missing, or refused."""


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t, whose first field is the algorithm."""

    _fields_ = (
        ("data", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Product:
    """codes (M × K) · weightᵀ (N × K) of int8 to int32, by any of `algorithms`.

    Raises CublasLtError where the library is missing or has no algorithm for the shape.
    """

    def __init__(self, tokens: int, rows: int, columns: int) -> None:
        self._handle, self._descriptor = c_void_p(), c_void_p()
        _call("Create", byref(self._handle))
        _call("MatmulDescCreate", byref(self._descriptor), c_int(_COMPUTE_32I), c_int(_R_32I))
        transposed = c_int32(_TRANSPOSED)
        _call("MatmulDescSetAttribute", self._descriptor, c_int(_TRANSA), byref(transposed), c_size_t(4))
        # Columns first, as cuBLAS counts: the weight transposed, times the tokens, is the result.
        shapes = (_R_8I, columns, rows), (_R_8I, columns, tokens), (_R_32I, rows, tokens)
        self._layouts = [_layout(*shape) for shape in shapes]
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self._shape = tokens, rows
        self.algorithms = self._algorithms()

    def __call__(self, codes: Tensor, weight: Tensor, algorithm: Any) -> Tensor:
        """The product on torch's current stream."""
        output = torch.empty(self._shape, dtype=torch.int32, device=codes.device)
        one, zero = c_int32(1), c_int32(0)
        left, right, result = self._layouts
        target = c_void_p(output.data_ptr())
        _call(
            "Matmul",
            self._handle,
            self._descriptor,
            byref(one),
            c_void_p(weight.data_ptr()),
            left,
            c_void_p(codes.data_ptr()),
            right,
            byref(zero),
            target,
            result,
            target,
            result,
            byref(algorithm),
            c_void_p(self._workspace.data_ptr()),
            c_size_t(WORKSPACE_BYTES),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        return output

    def _algorithms(self) -> list[_Algorithm]:
        preference, most, found = c_void_p(), c_uint64(WORKSPACE_BYTES), c_int()
        _call("MatmulPreferenceCreate", byref(preference))
        _call(
            "MatmulPreferenceSetAttribute", preference, c_int(_MAX_WORKSPACE_BYTES), byref(most), c_size_t(sizeof(most))
        )
        results = (_Algorithm * MOST_ALGORITHMS)()
        left, right, result = self._layouts
        operands = self._handle, self._descriptor, left, right, result, result, preference
        _call("MatmulAlgoGetHeuristic", *operands, c_int(MOST_ALGORITHMS), results, byref(found))
        algorithms = [one for one in results[: found.value] if one.state == 0]
        if not algorithms:
            raise CublasLtError("cuBLASLt has no algorithm for this shape")
        return algorithms


def products(codes: Tensor, weights: list[Tensor]) -> list[list[partial[Tensor]]]:
    """By algorithm, the calls of the same tokens with every weight."""
    product = Product(len(codes), *weights[0].shape)
    return [[partial(product, codes, weight, algorithm) for weight in weights] for algorithm in product.algorithms]


def _layout(kind: int, rows: int, columns: int) -> c_void_p:
    layout = c_void_p()
    _call("MatrixLayoutCreate", byref(layout), c_int(kind), c_uint64(rows), c_uint64(columns), c_int64(rows))
    return layout


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), f"cublasLt{name}")(*arguments)
    if status != 0:
        raise CublasLtError(f"cublasLt{name} returned status {status}")


@cache
def _library() -> ctypes.CDLL:
    for name in NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CublasLtError(f"none of {', '.join(NAMES)} is installed")
