"""Who multiplies by packed weights: the registered backends, and the choice among them.

A backend registers itself where it is defined: `reference` (plain torch, everywhere) here, others after it. The one
registered last is asked first. The environment variable BITFRONTIER_KERNELS names the only one to use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from workers.kernels import reference
from workers.kernels.errors import KernelError, check_tensor, refused
from workers.kernels.pack import Packed

VARIABLE = "BITFRONTIER_KERNELS"

INPUT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What tokens and results may be."""


class Backend(Protocol):
    """Multiplies tokens by packed weights. All arguments have been checked, and lie on one device."""

    def device_refusal(self, device: torch.device) -> str | None:
        """Why it can multiply nothing on a device; None where it can multiply something."""

    def refusal(self, packed: Packed, tokens: int, dtype: torch.dtype) -> str | None:
        """Why it cannot multiply that many tokens by this weight, with results of this type; None where it can."""

    def matmul(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """x · weightᵀ + bias of M × K tokens, M × N in x's type; x is rounded if the scheme says so."""

    def matmul_codes(
        self, codes: Tensor, token_scales: Tensor, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """The same of tokens that are rounded already: codes (int8, M × K) and scales (float32, M)."""


BACKENDS: dict[str, Backend] = {}


def backend(name: str) -> Callable[[type[Backend]], type[Backend]]:
    """Register a backend under `name`."""

    def register(kind: type[Backend]) -> type[Backend]:
        BACKENDS[name] = kind()
        return kind

    return register


@backend("reference")
class Reference:
    """Plain torch: refuses nothing."""

    def device_refusal(self, device: torch.device) -> str | None:
        """None."""
        return None

    def refusal(self, packed: Packed, tokens: int, dtype: torch.dtype) -> str | None:
        """None."""
        return None

    def matmul(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """As `reference.matmul`."""
        return reference.matmul(x, packed, bias)

    def matmul_codes(
        self, codes: Tensor, token_scales: Tensor, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """As `reference.matmul_codes`."""
        return reference.matmul_codes(codes, token_scales, packed, bias, out_dtype=out_dtype)


@torch.no_grad()
def matmul(x: Tensor, packed: Packed, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """x · weightᵀ + bias of … × K tokens, … × N in x's type; rounded to codes first if the scheme rounds activations.

    For inference: no gradient passes. Computed by the named backend, or BITFRONTIER_KERNELS', or the best that can.
    Raises KernelError naming the field, value and what is accepted: another type, shape or device, a tensor that is not
    contiguous, a backend that does not exist, or the reason why the named one cannot multiply these.
    """
    check_tensor("x", x, INPUT_TYPES, (*x.shape[:-1], packed.columns), packed.device)
    _check_bias(bias, packed)
    tokens = x.view(-1, packed.columns)
    chosen = choose(packed, len(tokens), x.dtype, backend)
    with _as_written(packed.device):
        return chosen.matmul(tokens, packed, bias).view(*x.shape[:-1], packed.rows)


@torch.no_grad()
def matmul_codes(
    codes: Tensor,
    token_scales: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """`matmul` of tokens that are rounded already: codes (int8, M × K) and scales (float32, M) to M × N results."""
    if not packed.scheme.quantizes_activations:
        raise refused("scheme", str(packed.scheme), "a scheme that rounds activations")
    if out_dtype not in INPUT_TYPES:
        raise refused("out_dtype", str(out_dtype), [str(dtype) for dtype in INPUT_TYPES])
    check_tensor("codes", codes, (torch.int8,), (*codes.shape[:1], packed.columns), packed.device)
    check_tensor("token_scales", token_scales, (torch.float32,), (len(codes),), packed.device)
    _check_bias(bias, packed)
    chosen = choose(packed, len(codes), out_dtype, backend)
    with _as_written(packed.device):
        return chosen.matmul_codes(codes, token_scales, packed, bias, out_dtype)


def choose(packed: Packed, tokens: int, dtype: torch.dtype, name: str | None = None) -> Backend:
    """The backend of that name, or of BITFRONTIER_KERNELS; else of those that can, the one registered last.

    Raises KernelError where the named one does not exist or cannot.
    """
    field = "backend" if name else VARIABLE
    name = name or os.environ.get(VARIABLE)
    if not name:
        return BACKENDS[_able(packed, tokens, dtype)[-1]]
    reason = _named(name, field).refusal(packed, tokens, dtype)
    if reason is not None:
        raise KernelError(
            f"{name} cannot multiply {tokens} × {packed.columns} tokens by {packed.rows} × {packed.columns} weights "
            f"in {packed.scheme}: {reason}",
            field=field,
            value=name,
            accepted=_able(packed, tokens, dtype),
        )
    return BACKENDS[name]


def deploys(device: torch.device) -> bool:
    """Whether models on a device are to be measured through packed weights: where another backend than the reference
    can multiply on it, or where BITFRONTIER_KERNELS names a backend.

    Raises KernelError where the named one does not exist or can multiply nothing on the device.
    """
    able = [name for name, backend in BACKENDS.items() if backend.device_refusal(device) is None]
    name = os.environ.get(VARIABLE)
    if not name:
        return able != ["reference"]
    reason = _named(name, VARIABLE).device_refusal(device)
    if reason is not None:
        detail = f"{VARIABLE}: {name} cannot multiply on {device}: {reason}"
        raise KernelError(detail, field=VARIABLE, value=name, accepted=able)
    return True


def check_named() -> None:
    """Raise KernelError where BITFRONTIER_KERNELS names no backend."""
    if name := os.environ.get(VARIABLE):
        _named(name, VARIABLE)


def _named(name: str, field: str) -> Backend:
    if name not in BACKENDS:
        raise refused(field, name, sorted(BACKENDS))
    return BACKENDS[name]


def _as_written(device: torch.device) -> AbstractContextManager[object]:
    """Within, torch computes in the types that it is given: autocast would round sums that must be exact."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    # Entering it for nothing would cost every product some microseconds.
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _able(packed: Packed, tokens: int, dtype: torch.dtype) -> list[str]:
    return [name for name, backend in BACKENDS.items() if backend.refusal(packed, tokens, dtype) is None]


def _check_bias(bias: Tensor | None, packed: Packed) -> None:
    if bias is not None:
        check_tensor("bias", bias, INPUT_TYPES, (packed.rows,), packed.device)
