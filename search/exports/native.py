"""Our own format: a versioned JSON document that says everything about one candidate, and its reader."""

from __future__ import annotations

import json
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from search.allocation import LayerSchemes, placed
from search.errors import InvalidRequest
from search.exports import Exported, export
from search.inventory import Inventory, LayerKind, Task, by_whole, whole_and_channels
from search.scheme import Scheme
from search.targets import find_target

SCHEMA: Final = "bitfrontier/configuration"
VERSION: Final = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelIdentity(_Strict):
    """Which weights the configuration was found for."""

    name: str
    """The name under which the model was searched."""
    digest: str
    """Content digest of the weights."""
    architecture: str
    """The model class."""
    task: Task
    """What the loss was measured on."""


class Point(_Strict):
    """Which candidate of its search this is."""

    number: int
    source: str
    label: str


class LayerConfig(_Strict):
    """How one searched layer is stored and multiplied; `rows` and `columns` are those of its weight matrix.

    Of a layer whose output channels take several schemes, each group of channels is one such entry, named as
    `search.allocation` says: `model.head[0:128]`.
    """

    name: str
    kind: LayerKind
    rows: int
    columns: int
    scheme: str
    """In the scheme grammar; the four fields below spell it out."""
    weight_bits: int
    activation_bits: int
    group_size: int | None
    """Weights along the input that share a scale; null: one scale per output channel."""
    symmetric: bool

    @model_validator(mode="after")
    def _spelled_out(self) -> Self:
        scheme = Scheme.parse(self.scheme)
        written = (self.weight_bits, self.activation_bits, self.group_size, self.symmetric)
        if written != (scheme.weight_bits, scheme.activation_bits, scheme.group_size, scheme.symmetric):
            raise ValueError(f"the bits, group and symmetry of {self.name} contradict its scheme {self.scheme}")
        return self


class Configuration(_Strict):
    """The document. Fields are only ever added within a version."""

    schema_: Literal["bitfrontier/configuration"] = Field(alias="schema")
    version: Literal[1]
    model: ModelIdentity
    target: str
    """The runtime the search was made for."""
    quantizer: str
    """The method that rounded the weights when the candidate was measured."""
    point: Point
    layers: tuple[LayerConfig, ...]
    """Searched layers in network order."""
    full_precision: tuple[str, ...]
    """Quantizable layers that were not searched; they stay as they are."""
    costs: dict[str, float]
    """Total per resource: size_bytes, avg_bits, bitops, and latency_us where latency was counted."""
    predicted: dict[str, float]
    """Predicted loss per sensitivity metric."""
    metrics: dict[str, float]
    """What was measured; empty for a candidate that was not."""

    @property
    def schemes(self) -> LayerSchemes:
        """The scheme of every searched layer."""
        return {layer.name: Scheme.parse(layer.scheme) for layer in self.layers}


@export(
    "json",
    filename="bitfrontier.json",
    description="Bitfrontier's own document: every layer's scheme, the costs and what was measured",
    carries="Every scheme of every model.",
    use="bitfrontier apply --config {file} --output {model}-quantized",
    splits_layers=True,
)
def write_native(exported: Exported) -> str:
    """The candidate as a `Configuration` document."""
    inventory, candidate, searched = exported.inventory, exported.candidate, by_whole(exported.schemes)
    document = Configuration(
        schema=SCHEMA,
        version=VERSION,
        model=ModelIdentity(
            name=exported.model,
            digest=inventory.digest,
            architecture=inventory.architecture,
            task=inventory.task,
        ),
        target=exported.target,
        quantizer=exported.quantizer,
        point=Point(number=candidate.number, source=candidate.source, label=candidate.label),
        layers=tuple(
            LayerConfig(
                name=layer.name,
                kind=layer.kind,
                rows=layer.rows,
                columns=layer.columns,
                scheme=str(scheme),
                weight_bits=scheme.weight_bits,
                activation_bits=scheme.activation_bits,
                group_size=scheme.group_size,
                symmetric=scheme.symmetric,
            )
            for layer, scheme in placed(exported.schemes, inventory.layers)
        ),
        full_precision=tuple(layer.name for layer in inventory.layers if layer.name not in searched),
        costs=candidate.costs,
        predicted=candidate.predicted,
        metrics=candidate.metrics,
    )
    return document.model_dump_json(by_alias=True, indent=2) + "\n"


def read_native(text: str) -> Configuration:
    """Read a document that `write_native` wrote.

    Raises InvalidRequest naming the first field that does not fit the schema.
    """
    try:
        return Configuration.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise InvalidRequest(
            f"not a {SCHEMA} document of version {VERSION}: {field}: {first['msg']}",
            field=field,
            accepted=f"a document with schema '{SCHEMA}' and version {VERSION}",
        ) from error


def check_document(document: Configuration, inventory: Inventory) -> None:
    """Raise InvalidRequest, naming the field, unless the document says of every layer of `inventory`, and of no other,
    what becomes of it."""
    find_target(document.target)
    _check_equal("model.architecture", document.model.architecture, inventory.architecture)
    _check_equal("model.task", document.model.task, inventory.task)
    layers = {layer.name: layer for layer in inventory.layers}
    taken: dict[str, list[range]] = {}
    for index, entry in enumerate(document.layers):
        field = f"layers.{index}"
        whole, channels = whole_and_channels(entry.name)
        if whole not in layers:
            raise _wrong(f"{field}.name", entry.name, "a layer of the model")
        try:
            layer = layers[whole].named(entry.name)
        except ValueError as error:
            raise _wrong(f"{field}.name", entry.name, f"channels of its {layers[whole].rows}") from error
        _check_equal(f"{field}.kind", entry.kind, layer.kind)
        _check_equal(f"{field}.rows", entry.rows, layer.rows)
        _check_equal(f"{field}.columns", entry.columns, layer.columns)
        rows = channels or range(layer.rows)
        if any(rows.start < other.stop and other.start < rows.stop for other in taken.setdefault(whole, [])):
            raise _wrong(f"{field}.name", entry.name, "each output channel once")
        taken[whole].append(rows)
    for index, name in enumerate(document.full_precision):
        if name not in layers or name in taken:
            raise _wrong(f"full_precision.{index}", name, "a layer of the model that 'layers' does not name")
    missing = sorted(layers.keys() - taken.keys() - set(document.full_precision))
    if missing:
        raise InvalidRequest(
            f"the document does not say what becomes of {missing[0]}",
            field="full_precision",
            value=missing[0],
            accepted="every quantizable layer of the model, here or in 'layers'",
        )


def _check_equal(field: str, told: object, known: object) -> None:
    if told != known:
        raise _wrong(field, told, known)


def _wrong(field: str, value: object, accepted: object) -> InvalidRequest:
    return InvalidRequest(
        f"the document does not fit the model: {field} is {str(value)[:200]}",
        field=field,
        value=value,
        accepted=accepted,
    )


def json_schema() -> str:
    """The JSON Schema of the document, published as docs/configuration.schema.json."""
    schema = Configuration.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{SCHEMA} version {VERSION}",
    }
    return json.dumps(schema, indent=2) + "\n"
