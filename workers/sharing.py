"""Weights that the processes of one machine share: each maps the same file, and the machine holds its pages once.

Safetensors in what the model computes in are mapped as they are by the library. What it would convert for every process
(GGUF, another number format, experts that are fused) is converted once, into a file in the data directory's cache.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fasteners  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from db.engine import data_directory

log = logging.getLogger(__name__)

FOLDER = "weights"
SPARE_BYTES = 2**30
"""Left free on the disk."""

MAPPED = 0.9
"""Of a model's bytes, from which on another file would hardly save memory. Small tensors are often converted."""


def load_shared(key: str, config: Any, options: dict[str, Any], load: Callable[[], nn.Module]) -> nn.Module:
    """The model that `load` gives on the CPU, with weights that are shared; private ones where the disk has no room.

    `key` names its content, `config` and `options` are what its class is made with. Shared weights are copied on write:
    no process sees what another does to them.
    """
    file = data_directory() / "cache" / FOLDER / f"{key}.safetensors"
    as_it_is = file.with_suffix(".mapped")
    if as_it_is.exists():
        return load()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with fasteners.InterProcessLock(file.parent / "lock"):
            if not file.exists():
                model = load()
                if is_mapped(model):
                    as_it_is.touch()
                    return model
                if not _write(model, file):
                    return model
                del model
    try:
        return _mapped(file, config, options)
    except Exception as error:  # of a damaged file the libraries raise anything
        log.warning("%s cannot be used: %s", file.name, error)
        file.unlink(missing_ok=True)
        return load()


def is_mapped(model: nn.Module) -> bool:
    """Whether nearly all of a model's weights lie in a mapped safetensors file."""
    regions = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [tuple(int(end, 16) for end in region[0].split("-")) for region in regions if _is_weights(region[5:])]
    tensors = list(model.parameters())
    mapped = [one.nbytes for one in tensors if any(begin <= one.data_ptr() < end for begin, end in ends)]
    return sum(mapped) >= MAPPED * sum(one.nbytes for one in tensors)


def _is_weights(path: list[str]) -> bool:
    return bool(path) and path[0].removesuffix(" (deleted)").endswith(".safetensors")


def _write(model: nn.Module, file: Path) -> bool:
    """Keep a model's weights in `file`, whole or not at all; False where the disk has no room. Others keep out."""
    from safetensors.torch import save_file

    tensors = _tensors(model)
    unfinished = file.with_suffix(".unfinished")
    for left in file.parent.glob("*.unfinished"):
        left.unlink()
    if not _make_room(file.parent, sum(one.nbytes for one in tensors.values()) + SPARE_BYTES):
        log.warning("the disk of %s has no room for weights: every evaluator keeps its own", file.parent)
        return False
    save_file(tensors, unfinished, {"class": type(model).__name__})
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())
    unfinished.replace(file)
    return True


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that is kept of a model, what is tied once."""
    kept = model.state_dict()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {name: tensor.contiguous() for name, tensor in (parameters | buffers).items()}


def _make_room(folder: Path, needed: int) -> bool:
    """Whether so many bytes are free, once the files longest unused have gone. Who maps one keeps its pages."""
    for oldest in sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime):
        if shutil.disk_usage(folder).free >= needed:
            break
        oldest.unlink()
    return shutil.disk_usage(folder).free >= needed


def _mapped(file: Path, config: Any, options: dict[str, Any]) -> nn.Module:
    import transformers
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(file, framework="pt") as opened:
        kind = getattr(transformers, opened.metadata()["class"])
    tensors = load_file(file)
    os.utime(file)
    dtype = next(one.dtype for one in tensors.values() if one.is_floating_point())
    model, report = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
    )
    if report["missing_keys"]:
        raise ValueError(f"it lacks {sorted(report['missing_keys'])[0]}")
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def digest_key(digest: str, dtype: torch.dtype) -> str:
    """What a file of shared weights is named: by what it was made from, and by what made it."""
    import transformers

    return f"{digest}-{str(dtype).removeprefix('torch.')}-{transformers.__version__}"
