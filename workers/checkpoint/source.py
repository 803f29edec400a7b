"""The full-precision files that a checkpoint is made from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from search.errors import UnsupportedModel
from workers.models import load_model
from workers.sources import CONFIG, INDEX, ModelFiles, gather, read_json

SHARD = "5GB"
"""Of a GGUF file as safetensors."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of safetensors' headers."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a safetensors file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.numel * self.dtype.itemsize


@dataclass(slots=True)
class Reader:
    """Reads tensors of several safetensors files, each of which is opened once."""

    _open: dict[Path, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, stored: Stored) -> Tensor:
        """The tensor, on the CPU."""
        from safetensors import safe_open

        if stored.file not in self._open:
            self._open[stored.file] = self._stack.enter_context(safe_open(stored.file, framework="pt"))
        tensor: Tensor = self._open[stored.file].get_tensor(stored.name)
        return tensor


@contextmanager
def safetensors_of(files: ModelFiles, source: str, scratch: Path) -> Iterator[ModelFiles]:
    """Within, the model as a folder of settings and safetensors: as it is, or a GGUF file unpacked under `scratch`, its
    weights in float32."""
    if not files.gguf:
        yield files
        return
    loaded: Any = load_model(source, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=scratch) as folder:
        _without_gguf(loaded.model).save_pretrained(folder, max_shard_size=SHARD)
        loaded.preprocessor.save_pretrained(folder)
        del loaded
        yield replace(gather(Path(folder)), name=files.name)


def _without_gguf(model: Any) -> Any:
    """A model with the same weights, which the library would not save under the names of a GGUF file."""
    vars(model.config).pop("quantization_config", None)
    with torch.device("meta"):
        same = type(model)(model.config)
    same.load_state_dict(model.state_dict(), assign=True)
    same.tie_weights()
    return same


def headers(files: ModelFiles) -> dict[str, Stored]:
    """Every tensor of the files by its name, in the files' order. Raises UnsupportedModel for other types."""
    from safetensors import safe_open

    found = {}
    for file in files.weights.values():
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                view = opened.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise UnsupportedModel(
                        f"{name} of {files.name} holds numbers of type {view.get_dtype()}",
                        field="model",
                        value=files.name,
                        accepted=sorted(DTYPES),
                    )
                found[name] = Stored(name, file, DTYPES[view.get_dtype()], tuple(view.get_shape()))
    return found


def config_with(files: ModelFiles, quantization: Mapping[str, Any], stored: Mapping[str, Stored]) -> str:
    """The model's own config.json with a `quantization_config`, and the type of its weights where it names none."""
    config = read_json(files.settings[CONFIG], CONFIG, files.name)
    if not (config.get("dtype") or config.get("torch_dtype")):
        # Who loads it would otherwise go by the first tensor, which may be a scale.
        config["dtype"] = str(_most(stored)).removeprefix("torch.")
    return json.dumps(config | {"quantization_config": quantization}, indent=2, ensure_ascii=False) + "\n"


def kept_files(files: ModelFiles) -> dict[str, Path]:
    """What goes into the checkpoint as it is, by its name there: tokenizer, generation settings, pooling."""
    kept = {**files.settings, **files.serving}
    return {name: file for name, file in kept.items() if name not in (CONFIG, INDEX)}


def _most(stored: Mapping[str, Stored]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for one in stored.values():
        if one.dtype.is_floating_point:
            sizes[one.dtype] = sizes.get(one.dtype, 0) + one.numel
    return max(sizes, key=lambda dtype: sizes[dtype])
