"""An allocation as a picture: which layer has how many bits, in network order, blocks side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from search.candidate import Candidate
from search.scheme import Scheme

# A grid that would be emptier than this (blocks of differing make) is shown as a plain strip.
LEAST_FILLED = 0.5

# From so many blocks on, columns are drawn narrow.
MANY_BLOCKS = 20

# Cells of longer texts do not fit a narrow column.
NARROW = 2


@dataclass(frozen=True, slots=True)
class Cell:
    """A layer and its scheme. `text` tells the schemes of the strip apart in as few characters as do; `differs` names
    the neighbours that have another scheme there."""

    layer: str
    scheme: str
    text: str
    differs: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """Weight bits."""
        return Scheme.parse(self.scheme).weight_bits


@dataclass(frozen=True, slots=True)
class Grid:
    """Blocks side by side: a row per kind of layer, a column per block, None where a block lacks it."""

    blocks: list[str]
    rows: list[tuple[str, list[Cell | None]]]

    @property
    def narrow(self) -> bool:
        """Whether the columns must be narrow, and can be."""
        texts = (cell.text for _, cells in self.rows for cell in cells if cell)
        return len(self.blocks) > MANY_BLOCKS and all(len(text) <= NARROW for text in texts)


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the searched weights a scheme has, and the text of its cells."""

    scheme: str
    text: str
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


def allocation_strip(
    point: Candidate, layers: list[dict[str, Any]], neighbours: Mapping[str, Mapping[str, str]] | None = None
) -> Strip:
    """The picture of a point. `layers` are the searched layers in network order, as in a search's summary;
    `neighbours` the allocations it is compared with, by a name for each."""
    known = [layer for layer in layers if layer["name"] in point.allocation]
    texts = cell_texts(point.allocation[layer["name"]] for layer in known)

    def cell(name: str) -> Cell:
        scheme = point.allocation[name]
        others = tuple(key for key, other in (neighbours or {}).items() if other.get(name) != scheme)
        return Cell(name, scheme, texts[scheme], others)

    cells = {layer["name"]: cell(layer["name"]) for layer in known}
    shares = _shares(known, cells)
    grid = _grid(known, cells)
    if grid is None:
        return Strip(list(cells.values()), None, [], shares)
    first = next(index for index, layer in enumerate(known) if layer["block"])
    loose = [(index, cells[layer["name"]]) for index, layer in enumerate(known) if not layer["block"]]
    before = [cell for index, cell in loose if index < first]
    return Strip(before, grid, [cell for index, cell in loose if index > first], shares)


def cell_texts(schemes: Iterable[str]) -> dict[str, str]:
    """Scheme → what its cells say: the weight bits, and as much more as tells these schemes apart.

    Rounded activations are always told, as `8·8`.
    """
    parsed = {text: Scheme.parse(text) for text in dict.fromkeys(schemes)}
    tellings: list[Callable[[Scheme], str]] = [_bits, lambda scheme: f"{_bits(scheme)}/{scheme.group_size or 'ch'}"]
    for telling in tellings:
        texts = {text: telling(scheme) for text, scheme in parsed.items()}
        if len(set(texts.values())) == len(texts):
            return texts
    return {text: text for text in parsed}


def _bits(scheme: Scheme) -> str:
    rounded = f"·{scheme.activation_bits}" if scheme.quantizes_activations else ""
    return f"{scheme.weight_bits}{rounded}"


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
    texts = {cell.scheme: cell.text for cell in cells.values()}
    for layer in layers:
        scheme = cells[layer["name"]].scheme
        weights[scheme] += layer["rows"] * layer["columns"]
        counts[scheme] += 1
    total = weights.total() or 1
    return [
        Share(scheme, texts[scheme], Scheme.parse(scheme).weight_bits, counts[scheme], weights[scheme] / total)
        for scheme in sorted(weights, key=Scheme.parse)
    ]
