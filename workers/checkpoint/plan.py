"""What a checkpoint will hold, tensor by tensor, before anything of it is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from search.errors import ExportRefused, UnsupportedModel
from search.exports import Exported
from search.inventory import Layer
from search.scheme import FULL_PRECISION, Scheme
from workers.checkpoint.compressed import FORMATS, WEIGHT, Layout, layout
from workers.checkpoint.source import Stored

SHARD_BYTES = 5_000_000_000
"""Of a checkpoint that takes more, each file takes at most so much (but for one tensor that is larger)."""

PATTERN = "re:"
_SUFFIX = f".{WEIGHT}"
_EXPERTS = ".experts."


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the source, and what is written of it: itself, or what stands for it in `scheme` and `format`.

    `modules` are those under whose names a quantized weight is written: its own, and others that share it.
    """

    stored: Stored
    scheme: Scheme = FULL_PRECISION
    format: str = ""
    modules: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """What is written, by the names of tensors."""
        if not self.modules:
            return {self.stored.name: (self.stored.dtype, self.stored.shape)}
        rows, columns = self.stored.shape
        parts = layout(rows, columns, self.scheme, self.format)
        return {f"{module}.{part}": what for module in self.modules for part, what in parts.items()}

    @property
    def nbytes(self) -> int:
        """Of what is written."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.layout.values())


def entries(exported: Exported, quantization: Mapping[str, Any], stored: Mapping[str, Stored]) -> list[Entry]:
    """Every tensor of the source, with the scheme that `quantization` (a compressed-tensors config) gives its module.

    Raises UnsupportedModel where the source does not hold the weight of a quantized layer under its name, and
    ExportRefused for a format that is not written here.
    """
    schemes = {name: scheme for name, scheme in exported.schemes.items() if scheme != FULL_PRECISION}
    layers = [layer for layer in exported.inventory.layers if layer.name in schemes]
    owners, modules, groups = _owners(layers, stored), _modules(stored, layers), _Groups(quantization)
    missing = {owner: sum(layer.weights for layer in own) for owner, own in owners.items()}
    found = []
    for one in stored.values():
        stem = one.name.removesuffix(_SUFFIX)
        module = modules.get(stem, stem)
        group = groups.of(module) if one.name.endswith(_SUFFIX) else None
        owner = module if module in owners else _block(module)
        if group is None or owner not in owners:
            found.append(Entry(one))
            continue
        layer = next((layer for layer in owners[owner] if one.shape[1:] == (layer.columns,)), None)
        if layer is None:
            raise _elsewhere(owners[owner][0], exported)
        missing[owner] -= one.numel
        sharing = [name for name in layer.aliases if f"{name}{_SUFFIX}" not in stored]
        found.append(Entry(one, schemes[layer.name], groups.format(group, layer), (stem, *sharing)))
    for owner, weights in missing.items():
        if weights:
            raise _elsewhere(owners[owner][0], exported)
    return found


def shards(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that go into one file, in their order."""
    found: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if found[-1] and size + entry.nbytes > SHARD_BYTES:
            found.append([])
            size = 0
        found[-1].append(entry)
        size += entry.nbytes
    return found


def shard_names(count: int) -> list[str]:
    """What the files of weights are called."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _owners(layers: Sequence[Layer], stored: Iterable[str]) -> dict[str, list[Layer]]:
    """What stored weights are found by → their layers: a layer's own name and those that share its weight and are
    stored, too, or the block whose experts the files keep one by one."""
    known, found = set(stored), dict[str, list[Layer]]()
    for layer in layers:
        names = [layer.name, *(name for name in layer.aliases if f"{name}{_SUFFIX}" in known)]
        for name in names if layer.kind != "experts" else [_block(layer.name)]:
            found.setdefault(name, []).append(layer)
    return found


def _block(expert: str) -> str:
    """The block of an expert: files and models may call the module between them by different names."""
    return expert.rpartition(_EXPERTS)[0].rpartition(".")[0]


def _modules(stored: Iterable[str], layers: Sequence[Layer]) -> dict[str, str]:
    """What a weight of the source is called → the layer that has it, where they differ.

    They may in a first part: a backbone's files may name the model it was part of, and a model's files may lack it.
    """
    stems = [name.removesuffix(_SUFFIX) for name in stored if name.endswith(_SUFFIX)]
    known = set(stems)
    found = {}
    for layer in layers:
        if layer.kind == "linear" and layer.name not in known:
            ends = [stem for stem in stems if stem.endswith(f".{layer.name}") or layer.name.endswith(f".{stem}")]
            if len(ends) == 1:
                found[ends[0]] = layer.name
    return found


class _Groups:
    """The groups of a compressed-tensors config, found by a module's name."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        self._named: dict[str, Mapping[str, Any]] = {}
        self._patterns: list[tuple[re.Pattern[str], Mapping[str, Any]]] = []
        for group in quantization["config_groups"].values():
            for target in group["targets"]:
                if target.startswith(PATTERN):
                    self._patterns.append((re.compile(target.removeprefix(PATTERN)), group))
                else:
                    self._named[target] = group

    def of(self, module: str) -> Mapping[str, Any] | None:
        """The group that targets a module."""
        fitting = (group for pattern, group in self._patterns if pattern.match(module))
        return self._named.get(module) or next(fitting, None)

    @staticmethod
    def format(group: Mapping[str, Any], layer: Layer) -> str:
        """How a group is stored. Raises ExportRefused for what is not written here."""
        format = str(group["format"])
        if format not in FORMATS:
            raise ExportRefused(
                f"{layer.name} would be stored as {format}", field=layer.name, value=format, accepted=list(FORMATS)
            )
        return format


def _elsewhere(layer: Layer, exported: Exported) -> UnsupportedModel:
    return UnsupportedModel(
        f"the files of '{exported.model}' do not hold the weight of {layer.name}, {layer.rows} × {layer.columns}, "
        "under the name of that layer",
        field="model",
        value=exported.model,
    )
