"""What the kernels refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from search.errors import BitfrontierError


class KernelError(BitfrontierError):
    """No kernel stores or multiplies this."""

    status = 422
    type = "unsupported-kernel"
    title = "The kernels cannot store or multiply this"


def refused(field: str, value: object, accepted: object) -> KernelError:
    """The error of a field whose value is not accepted."""
    detail = f"{field} cannot be {value}; accepted: {accepted}"
    return KernelError(detail, field=field, value=value, accepted=accepted)


def check_tensor(
    field: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device | None = None,
) -> None:
    """Raise KernelError unless a tensor is contiguous, of this shape, on this device and of one of these types."""
    if tensor.dtype not in dtypes:
        raise refused(field, str(tensor.dtype), [str(dtype) for dtype in dtypes])
    if tuple(tensor.shape) != shape:
        raise refused(field, tuple(tensor.shape), shape)
    if device is not None and tensor.device != device:
        raise refused(field, str(tensor.device), str(device))
    if not tensor.is_contiguous():
        raise refused(field, tensor.stride(), "a contiguous tensor")
