"""What a search may name: models, schemes, metrics, targets."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from api.dependencies import Database
from api.problems import responses
from db.models import list_models
from search.exports import EXPORTS
from search.metrics import METRICS, Evidence, Need
from search.scheme import ACTIVATION_BITS, FULL_PRECISION, GRAMMAR, GROUP_SIZES, WEIGHT_BITS, Scheme
from search.targets import TARGETS

router = APIRouter(prefix="/v1", tags=["catalog"])

EXAMPLE_COLUMNS = 4096


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ModelDocument(_Document):
    """A registered model. `layers` and what follows are null until it has been inspected."""

    name: Annotated[str, Field(examples=["all-minilm-l6-v2"])]
    source: str
    architecture: str | None
    task: str | None
    parameters: int | None
    layers: int | None
    """Number of quantizable layers."""
    created_at: datetime


class Models(_Document):
    """The registered models."""

    models: list[ModelDocument]


class SchemeDocument(_Document):
    """A scheme, spelled out."""

    scheme: Annotated[str, Field(examples=["w4a16g64"])]
    weight_bits: int
    activation_bits: int
    group_size: int | None
    symmetric: bool
    bits_per_weight: float
    """Stored bits per weight of a 4096-column layer, scales and zero points counted."""


class Schemes(_Document):
    """The scheme grammar, its vocabulary, and examples generated from it."""

    grammar: str
    weight_bits: list[int]
    activation_bits: list[int]
    group_sizes: list[int]
    examples: list[SchemeDocument]


class MetricDocument(_Document):
    """A way to predict the loss increase of a unit at a scheme."""

    name: Annotated[str, Field(examples=["hessian_trace"])]
    title: str
    evidence: Evidence
    """What the prediction rests on."""
    needs: list[Need]
    """What it computes from. `labels`: the calibration data must have some."""
    in_loss_units: bool
    """Whether its values are predicted losses; else they are relative scores, which only rank units and schemes."""
    sees_activations: bool
    """Whether rounded activations count."""


class Metrics(_Document):
    """The metrics that `sensitivity` takes."""

    metrics: list[MetricDocument]


class TargetDocument(_Document):
    """A runtime that can load a result."""

    name: str
    description: str
    fused: list[list[str]]
    """Sibling layers that must share a scheme."""
    ties_experts: bool
    """Whether all experts of a layer must share a scheme."""
    schemes: list[str]
    """Those of the example schemes that it takes."""


class ExportDocument(_Document):
    """A file format of a point."""

    name: str
    description: str
    media_type: str


class Targets(_Document):
    """Targets, and the formats points are exported in."""

    targets: list[TargetDocument]
    exports: list[ExportDocument]


@router.get("/models", responses=responses(), summary="Registered models")
def models(engine: Database) -> Models:
    """Models that a search may name; any Hugging Face id `org/name` may be named besides."""
    documents = [
        ModelDocument(
            name=model.name,
            source=model.source,
            architecture=model.inventory.architecture if model.inventory else None,
            task=model.inventory.task if model.inventory else None,
            parameters=model.inventory.parameters if model.inventory else None,
            layers=len(model.inventory.layers) if model.inventory else None,
            created_at=model.created_at,
        )
        for model in list_models(engine)
    ]
    return Models(models=documents)


@router.get("/schemes", responses=responses(), summary="The scheme grammar")
def schemes() -> Schemes:
    """How schemes are written; every combination is accepted, the examples show some."""
    return Schemes(
        grammar=GRAMMAR,
        weight_bits=list(WEIGHT_BITS),
        activation_bits=list(ACTIVATION_BITS),
        group_sizes=list(GROUP_SIZES),
        examples=[_scheme(example) for example in example_schemes()],
    )


@router.get("/metrics", responses=responses(), summary="Sensitivity metrics")
def metrics() -> Metrics:
    """The metrics that a search may predict the loss with, and what each one needs and says."""
    return Metrics(
        metrics=[
            MetricDocument(
                name=metric.name,
                title=metric.title,
                evidence=metric.evidence,
                needs=list(metric.needs),
                in_loss_units=metric.in_loss_units,
                sees_activations=metric.sees_activations,
            )
            for metric in METRICS.values()
        ]
    )


@router.get("/targets", responses=responses(), summary="Targets and exports")
def targets() -> Targets:
    """The runtimes a search can aim at, and the files a point can become."""
    return Targets(
        targets=[
            TargetDocument(
                name=target.name,
                description=target.description,
                fused=[list(siblings) for siblings in target.fused],
                ties_experts=target.ties_experts,
                schemes=[str(scheme) for scheme in example_schemes() if target.refuses_scheme(scheme) is None],
            )
            for target in TARGETS.values()
        ],
        exports=[
            ExportDocument(name=export.name, description=export.description, media_type=export.media_type)
            for export in EXPORTS.values()
        ],
    )


def example_schemes() -> list[Scheme]:
    """One scheme of each shape at every width that quantizes, and full precision."""
    widths = [bits for bits in WEIGHT_BITS if bits < FULL_PRECISION.weight_bits]
    grouped = [Scheme(bits, group_size=64) for bits in widths]
    asymmetric = [Scheme(bits, group_size=64, symmetric=False) for bits in widths]
    per_channel = [Scheme(bits) for bits in widths]
    activations = [Scheme(bits, bits) for bits in widths if bits in ACTIVATION_BITS]
    return [*grouped, *asymmetric, *per_channel, *activations, FULL_PRECISION]


def _scheme(scheme: Scheme) -> SchemeDocument:
    return SchemeDocument(
        scheme=str(scheme),
        weight_bits=scheme.weight_bits,
        activation_bits=scheme.activation_bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        bits_per_weight=scheme.storage_bits(1, EXAMPLE_COLUMNS) / EXAMPLE_COLUMNS,
    )
