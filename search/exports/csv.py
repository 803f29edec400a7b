"""CSV: a row for every layer, or part of one, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from search.allocation import placed
from search.exports import Exported, export
from search.inventory import Layer, whole_and_channels
from search.scheme import FULL_PRECISION, Scheme
from search.space import tie
from search.targets import find_target

COLUMNS = (
    "name",
    "kind",
    "block",
    "unit",
    "searched",
    "rows",
    "columns",
    "weights",
    "scheme",
    "weight_bits",
    "activation_bits",
    "group_size",
    "symmetric",
    "bytes",
)


@export(
    "csv",
    filename="bitfrontier.csv",
    description="A row for every layer: its shape, its scheme, what it takes to store it",
    carries="Every scheme of every model.",
    use="python -c \"import pandas; print(pandas.read_csv('{file}').groupby(['kind', 'scheme'])['bytes'].sum())\"",
    media_type="text/csv",
    splits_layers=True,
)
def write_csv(exported: Exported) -> str:
    """The candidate as a table, layers that were not searched included."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(_rows(exported))
    return text.getvalue()


def _rows(exported: Exported) -> Iterator[tuple[object, ...]]:
    layers, schemes = exported.inventory.layers, exported.schemes
    units = {layer.name: unit.name for unit in tie(list(layers), find_target(exported.target)) for layer in unit.layers}
    taken: dict[str, list[tuple[Layer, Scheme]]] = {}
    for part, scheme in placed(schemes, layers):
        taken.setdefault(whole_and_channels(part.name)[0], []).append((part, scheme))
    for layer in layers:
        searched = taken.get(layer.name)
        for part, scheme in searched or [(layer, FULL_PRECISION)]:
            yield (
                _text(part.name),
                part.kind,
                _text(part.block),
                _text(units[layer.name]),
                bool(searched),
                part.rows,
                part.columns,
                part.weights,
                scheme,
                scheme.weight_bits,
                scheme.activation_bits,
                scheme.group_size,
                scheme.symmetric,
                scheme.storage_bits(part.rows, part.columns) / 8,
            )


def _text(name: str | None) -> str | None:
    # A spreadsheet would run what begins like this; a model may come from anywhere.
    return f"'{name}" if name and name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
