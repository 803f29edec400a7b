"""Two devices that are none: tensors of this machine's memory that say that they lie elsewhere.

As on real devices, what lies on one cannot be computed with what lies on another. For a process of its own: torch knows
of the devices as long as it lives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
FIRST, SECOND = f"{NAME}:0", f"{NAME}:1"
MOVES = {"_to_copy", "copy_"}
"""The operations that may have tensors of several devices."""


class _Devices(backend_registration._DummyBackendModule):
    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


class Elsewhere(Tensor):
    """A tensor that says that it lies on `device`; `here` is the true one."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, device: torch.device) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=device,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        self.here = value.here

    def tolist(self) -> Any:
        return self.here.tolist()


class _Generator(torch.Generator):
    def __new__(cls, _device: object = None) -> Any:
        return super().__new__(cls, "cpu")


class Pretending(TorchDispatchMode):
    """Within, tensors can be made on the devices, too."""

    def __enter__(self) -> Any:
        self._generator = torch.Generator
        # Random numbers are drawn here, wherever they then say that they lie.
        torch.Generator = _Generator  # type: ignore[misc]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Generator = self._generator  # type: ignore[misc]
        super().__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    # As of a GPU: a number alone may lie here.
    where = {one.device for one in tensors if one.dim() or one.device.type != "cpu"}
    name = operation._overloadpacket.__name__
    if len(where) > 1 and name not in MOVES:
        raise RuntimeError(f"{operation} of tensors on {', '.join(map(str, where))}")
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else next(iter(where), torch.device("cpu"))
    if asked is not None and device.type == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(_here, (args, kwargs))
    result = operation(*plain_args, **plain_kwargs)
    if name == "copy_":
        return args[0]
    known = {id(one.here): one for one in tensors if isinstance(one, Elsewhere)}

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor) or device.type != NAME:
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value, device)

    return tree_map(there, result)


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Elsewhere) else value


def register() -> None:
    """Make the devices known to torch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Devices())
