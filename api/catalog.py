"""The JSON documents of what a search may name: models, schemes, metrics, targets, exports, latency profiles."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from search.metrics import Evidence, Need

if TYPE_CHECKING:
    from db.models import Model
    from search.latency_profile import LatencyProfile


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

    @classmethod
    def of(cls, model: Model) -> ModelDocument:
        """The document of a registered model."""
        inventory = model.inventory
        return cls(
            name=model.name,
            source=model.source,
            architecture=inventory.architecture if inventory else None,
            task=inventory.task if inventory else None,
            parameters=inventory.parameters if inventory else None,
            layers=len(inventory.layers) if inventory else None,
            created_at=model.created_at,
        )


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
    default_schemes: list[str]
    """Those that are open to every layer where a request names none."""


class ExportDocument(_Document):
    """A file format of a point."""

    name: str
    description: str
    media_type: str
    filename: str
    carries: str
    """Which schemes and models it can express."""
    use: str
    """The command that uses the file, with `{file}`, `{search}`, `{point}`, `{model}` and, for what the tool
    loads it from, `{source}` in it."""


class Targets(_Document):
    """Targets, and the formats points are exported in."""

    targets: list[TargetDocument]
    exports: list[ExportDocument]


class LatencyProfileDocument(_Document):
    """What was measured on a device, without the times."""

    device: str = Field(examples=["NVIDIA H100 80GB HBM3"])
    """What a search names it by in `latency.profile`."""
    key: str
    """Names it among several of a device; a search may name it by this, too."""
    driver: str
    backend: str
    """The kernels that multiplied."""
    sources: str
    """Digest of their sources."""
    dtype: str
    """Of the tokens."""
    created: str
    """When it was last added to."""
    products: int
    """How many times it has, each of a weight's shape, a number of tokens and a scheme."""
    forwards: int
    """How many forward passes of whole models it has beside them."""
    tokens: list[int]
    """The numbers of tokens that were multiplied at once; an image counts as many as it has places."""
    schemes: list[str]

    @classmethod
    def of(cls, profile: LatencyProfile) -> LatencyProfileDocument:
        """The document of a profile."""
        return cls(
            device=profile.device,
            key=profile.key,
            driver=profile.driver,
            backend=profile.backend,
            sources=profile.sources,
            dtype=profile.dtype,
            created=profile.created,
            products=len(profile.times),
            forwards=len(profile.checks),
            tokens=profile.tokens,
            schemes=[str(scheme) for scheme in profile.schemes],
        )


class LatencyProfiles(_Document):
    """The stored profiles; of a device that has several, a search takes the first."""

    profiles: list[LatencyProfileDocument]
