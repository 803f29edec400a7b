"""What a model is made of, as far as a search must know: its quantizable layers, without any weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

LayerKind = Literal["linear", "conv", "embedding", "experts"]
Task = Literal["causal-lm", "embedding", "image-classification", "sequence-classification"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantizable module by its qualified name; its weight is seen as a rows × columns matrix.

    Rows are output channels (vocabulary entries of an embedding, expert × output channel of fused experts), columns
    what one output channel multiplies. `macs` counts the multiply-accumulates of one input item: one token of text,
    or one image. `block` is the repeated module the layer stands in ("encoder.layer.3"). `aliases` are further
    modules that share the same weight.
    """

    name: str
    kind: LayerKind
    rows: int
    columns: int
    macs: int = 0
    block: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


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
