"""How large a checkpoint is on disk, and what makes it differ from the size that the search counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.inventory import Inventory
from workers.checkpoint.compressed import PACKED, SHAPE, padding_bytes
from workers.checkpoint.plan import Entry

COUNTED_BYTES = 2.0
"""Of a number that is not quantized, in `size_bytes`."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the files of weights; what the search counted; and the differences, which sum up to what lies between.

    `wider`: what is not quantized takes as many bytes as in the source, not two a number. `uncounted`: numbers in the
    source's files that are not among the model's parameters (buffers, weights that are stored twice). `shared`:
    quantized weights that are stored for several modules. `shapes`: the shape beside every packed weight. `padding`: of
    rows that end within a word. `headers`: of the files.
    """

    stored: int
    predicted: float | None
    wider: float
    uncounted: float
    shared: float
    shapes: float
    padding: float
    headers: float

    @property
    def differences(self) -> dict[str, float]:
        """By name, those that are not zero."""
        names = ("wider", "uncounted", "shared", "shapes", "padding", "headers")
        return {name: value for name in names if (value := getattr(self, name))}


def sizes(entries: Sequence[Entry], inventory: Inventory, stored: int, predicted: float | None) -> Sizes:
    """The sizes of a checkpoint whose files of weights take `stored` bytes."""
    kept = [entry.stored for entry in entries if not entry.modules]
    quantized = [entry for entry in entries if entry.modules]
    packed = [entry for entry in quantized if entry.format == PACKED]
    shapes = [entry.layout[f"{entry.modules[0]}.{SHAPE}"] for entry in packed]
    others = inventory.parameters - sum(entry.stored.numel for entry in quantized)
    return Sizes(
        stored=stored,
        predicted=predicted,
        wider=sum(one.nbytes - COUNTED_BYTES * one.numel for one in kept),
        uncounted=COUNTED_BYTES * (sum(one.numel for one in kept) - others),
        shared=sum(entry.nbytes * (1 - 1 / len(entry.modules)) for entry in quantized),
        shapes=float(sum(dtype.itemsize * shape[0] for dtype, shape in shapes)),
        padding=sum(padding_bytes(*_shape(entry), entry.scheme, entry.format) for entry in quantized),
        headers=float(stored - sum(entry.nbytes for entry in entries)),
    )


def _shape(entry: Entry) -> tuple[int, int]:
    rows, columns = entry.stored.shape
    return rows, columns
