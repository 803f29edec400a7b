"""What a model is made of, as far as a search must know: its quantizable layers, without any weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

LayerKind = Literal["linear", "conv", "embedding", "experts"]
Task = Literal["causal-lm", "embedding", "image-classification", "sequence-classification"]

_PART = re.compile(r"(?P<whole>.+)\[(?P<start>[0-9]{1,12}):(?P<stop>[0-9]{1,12})\]")


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantizable module by its qualified name; its weight is seen as a rows × columns matrix.

    Rows are output channels (vocabulary entries of an embedding, expert × output channel of fused experts), columns
    what one output channel multiplies. `macs` counts the multiply-accumulates of one input item: one token of text,
    or one image. `block` is the repeated module the layer stands in ("encoder.layer.3"). `aliases` are further
    modules that share the same weight. For one item it multiplies `calls` times (an embedding: 0), by as many places of
    the item each time. `transposed` marks weights stored as inputs × outputs (GPT-2's Conv1D, some fused experts).
    """

    name: str
    kind: LayerKind
    rows: int
    columns: int
    macs: int = 0
    block: str | None = None
    aliases: tuple[str, ...] = ()
    calls: int = 1
    transposed: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def part(self, channels: range) -> Layer:
        """Some output channels of a linear layer, as a layer of its own: `model.head[0:128]`.

        Raises ValueError for other kinds of layers and for channels that the layer does not have.
        """
        start, stop = channels.start, channels.stop
        if self.kind != "linear" or not 0 <= start < stop <= self.rows:
            raise ValueError(f"{self.kind} layer {self.name} of {self.rows} channels has no part [{start}:{stop}]")
        macs = self.macs * stop // self.rows - self.macs * start // self.rows
        return replace(self, name=f"{self.name}[{start}:{stop}]", rows=len(channels), macs=macs)

    def named(self, name: str) -> Layer:
        """The layer itself, or the part of it that `name` stands for.

        Raises what `part` raises.
        """
        channels = whole_and_channels(name)[1]
        return self if channels is None else self.part(channels)


@dataclass(frozen=True, slots=True)
class Inventory:
    """A model's content digest, architecture, task, number of parameters and quantizable layers, in network order."""

    digest: str
    architecture: str
    task: Task
    parameters: int
    layers: tuple[Layer, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Inventory:
        """The inverse of `to_json`."""
        layers = tuple(Layer(**(layer | {"aliases": tuple(layer["aliases"])})) for layer in document["layers"])
        return cls(**(document | {"layers": layers}))


def whole_and_channels(name: str) -> tuple[str, range | None]:
    """The whole layer that a name stands for, and which of its output channels; None for all of them."""
    part = _PART.fullmatch(name)
    return (part["whole"], range(int(part["start"]), int(part["stop"]))) if part else (name, None)


def by_whole(names: Iterable[str]) -> dict[str, list[str]]:
    """Whole layer → those of the names that stand for it or for parts of it."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(whole_and_channels(name)[0], []).append(name)
    return found
