"""An allocation as a picture: which layer has how many bits, in network order, blocks side by side."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from search.candidate import Candidate
from search.scheme import Scheme

# A grid that would be emptier than this (blocks of differing make) is shown as a plain strip.
LEAST_FILLED = 0.5


@dataclass(frozen=True, slots=True)
class Cell:
    """A layer and its scheme."""

    layer: str
    scheme: str

    @property
    def bits(self) -> int:
        """Weight bits."""
        return Scheme.parse(self.scheme).weight_bits

    @property
    def text(self) -> str:
        """Weight bits, and activation bits where those are quantized."""
        scheme = Scheme.parse(self.scheme)
        return f"{scheme.weight_bits}·{scheme.activation_bits}" if scheme.quantizes_activations else f"{self.bits}"


@dataclass(frozen=True, slots=True)
class Grid:
    """Blocks side by side: a row per kind of layer, a column per block, None where a block lacks it."""

    blocks: list[str]
    rows: list[tuple[str, list[Cell | None]]]


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the searched weights a scheme has."""

    scheme: str
    bits: int
    layers: int
    fraction: float


@dataclass(frozen=True, slots=True)
class Strip:
    """The layers before the blocks, the blocks, the layers after; and the share of each scheme."""

    before: list[Cell]
    grid: Grid | None
    after: list[Cell]
    shares: list[Share]


def allocation_strip(point: Candidate, layers: list[dict[str, Any]]) -> Strip:
    """The picture of a point. `layers` are the searched layers in network order, as in a search's summary."""
    known = [layer for layer in layers if layer["name"] in point.allocation]
    cells = {layer["name"]: Cell(layer["name"], point.allocation[layer["name"]]) for layer in known}
    shares = _shares(known, cells)
    grid = _grid(known, cells)
    if grid is None:
        return Strip(list(cells.values()), None, [], shares)
    first = next(index for index, layer in enumerate(known) if layer["block"])
    loose = [(index, cells[layer["name"]]) for index, layer in enumerate(known) if not layer["block"]]
    before = [cell for index, cell in loose if index < first]
    return Strip(before, grid, [cell for index, cell in loose if index > first], shares)


def _grid(layers: list[dict[str, Any]], cells: dict[str, Cell]) -> Grid | None:
    blocks = list(dict.fromkeys(layer["block"] for layer in layers if layer["block"]))
    by_place = {
        (layer["name"].removeprefix(layer["block"] + "."), layer["block"]): cells[layer["name"]]
        for layer in layers
        if layer["block"]
    }
    kinds = list(dict.fromkeys(kind for kind, _ in by_place))
    if len(blocks) < 2 or len(by_place) < LEAST_FILLED * len(kinds) * len(blocks):
        return None
    return Grid(blocks, [(kind, [by_place.get((kind, block)) for block in blocks]) for kind in kinds])


def _shares(layers: list[dict[str, Any]], cells: dict[str, Cell]) -> list[Share]:
    weights: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for layer in layers:
        scheme = cells[layer["name"]].scheme
        weights[scheme] += layer["rows"] * layer["columns"]
        counts[scheme] += 1
    total = weights.total() or 1
    schemes = sorted(weights, key=Scheme.parse)
    return [
        Share(scheme, Scheme.parse(scheme).weight_bits, counts[scheme], weights[scheme] / total) for scheme in schemes
    ]
