"""What a person may ask: the body of POST /v1/searches. Unknown fields are refused, and so are words for numbers; every
field says what it takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator, model_validator

from search.budget import BUDGETS
from search.errors import InvalidRequest
from search.inventory import LayerKind
from search.metrics import METRICS, MetricName
from search.scheme import Scheme
from search.targets import TARGETS

ModelName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=200),
]
# No part begins with a dot: nothing leads out of the data sets folder.
DatasetName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*/?$", max_length=200)
]
Pattern = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$", max_length=300)]
Amount = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False, strict=True)]
KIND = "kind:"
"""Begins a pattern that names layers by their kind."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Calibration(_Strict):
    """The data on which the loss is measured. Two further, disjoint splits of its size decide what is accepted, and
    what is reported."""

    dataset: DatasetName | None = None
    """`python-docs` (built in), the name of a file or folder in the data sets folder, or a Hugging Face data set
    id. Left out: `python-docs` for text models; image models have no default."""
    samples: int = Field(32, ge=2, le=4096, strict=True)
    """Sequences or images per split."""
    sequence_length: int = Field(256, ge=8, le=8192, strict=True)
    """Tokens per sequence (text models only)."""
    seed: int = Field(0, ge=0, lt=2**31, strict=True)
    """Which samples are drawn, and which go to which split."""


class SpaceRequest(_Strict):
    """Which schemes may be taken, and what takes one: each layer, unless `granularity` says otherwise."""

    schemes: tuple[str, ...] = Field(TARGETS["generic"].default_schemes, min_length=1, max_length=32)
    """Schemes open to every layer, for example `w4a16g64`. Left out: the target's, see GET /v1/targets."""
    quantizer: Literal["rtn", "mse"] = "rtn"
    """`rtn` rounds to the min-max grid; `mse` clips each group where its squared error is least."""
    ignore: tuple[Pattern, ...] = Field(("lm_head",), max_length=1000)
    """Layers to leave at full precision, by name or glob (`*.classifier`)."""
    pin: dict[Pattern, str] = Field(default_factory=dict, max_length=1000)
    """Layers whose scheme is settled, by name or glob: `{"*.down_proj": "w8a16g64"}`. It settles the whole unit."""
    granularity: Literal["layer", "block", "channels"] = "layer"
    """What takes a scheme of its own: a `layer` (with those that the target fuses with it); a whole `block`, such as
    `model.layers.3`; or some output `channels` of each linear layer, with weight-only schemes."""
    channels: int | None = Field(None, ge=1, le=1_000_000, strict=True)
    """With granularity `channels`: how many consecutive output channels share a scheme. The last may be fewer."""

    @field_validator("schemes")
    @classmethod
    def _known_schemes(cls, schemes: tuple[str, ...]) -> tuple[str, ...]:
        parsed = [Scheme.parse(text) for text in schemes]
        return tuple(str(scheme) for scheme in sorted(set(parsed)))

    @field_validator("pin")
    @classmethod
    def _known_pins(cls, pin: dict[str, str]) -> dict[str, str]:
        return {pattern: str(Scheme.parse(text, "space.pin")) for pattern, text in pin.items()}

    @model_validator(mode="after")
    def _channels_of_layers(self) -> Self:
        if (self.channels is None) == (self.granularity == "channels"):
            raise InvalidRequest(
                "space.channels is how many output channels share a scheme with granularity 'channels', and only then",
                field="space.channels",
                value=self.channels,
                accepted="a number such as 128" if self.channels is None else "nothing, or granularity 'channels'",
            )
        return self

    @model_validator(mode="after")
    def _inputs_of_layers(self) -> Self:
        asked = [("space.schemes", text) for text in self.schemes] + [("space.pin", text) for text in self.pin.values()]
        for field, text in asked:
            if self.granularity == "channels" and Scheme.parse(text).quantizes_activations:
                raise InvalidRequest(
                    f"{text} quantizes activations, which all output channels of a layer share",
                    field=field,
                    value=text,
                    accepted="a16 schemes, or granularity 'layer' or 'block'",
                )
        return self


class _Bounds(_Strict):
    def named(self) -> dict[str, float]:
        """The budgets that were given, by name; without the limits on some of the layers."""
        return {name: value for name in BUDGETS if (value := getattr(self, name, None)) is not None}


class Limit(_Bounds):
    """Upper bounds on what the layers of a pattern cost together, all of which hold. At least one is named."""

    avg_bits: Amount | None = None
    """Stored bits per weight of these layers."""
    size_mb: Amount | None = None
    """These layers at their schemes, in 10⁶ bytes."""
    gbitops: Amount | None = None
    """10⁹ bit operations of these layers for one token or one image."""
    latency_ms: Amount | None = None
    """What these layers take on the device of `latency`, in milliseconds."""

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if not self.named():
            raise ValueError(f"name at least one of {', '.join(Limit.model_fields)}")
        return self


class Budgets(_Bounds):
    """Upper bounds, all of which hold. At least one is named."""

    avg_bits: Amount | None = None
    """Stored bits per searched weight; scales and zero points are counted (w4a16g64 is 4.25)."""
    size_mb: Amount | None = None
    """The whole model in 10⁶ bytes: searched layers at their schemes, everything else at 16 bits."""
    gbitops: Amount | None = None
    """10⁹ bit operations for one token or one image: MACs × weight bits × activation bits."""
    latency_ms: Amount | None = None
    """Milliseconds that the layers of the whole model take one after the other on the device of `latency`."""
    loss_increase: Amount | None = None
    """Measured divergence from full precision on the held-out split."""
    limits: dict[Pattern, Limit] = Field(default_factory=dict, max_length=32)
    """Budgets on some of the layers, by name or glob, or by kind: `{"*.down_proj": {"avg_bits": 6.25},
    "kind:embedding": {"size_mb": 20}}`. Each bounds what its layers cost together."""

    @field_validator("limits")
    @classmethod
    def _known_kinds(cls, limits: dict[str, Limit]) -> dict[str, Limit]:
        for pattern in limits:
            kind = pattern.removeprefix(KIND)
            if kind != pattern and kind not in get_args(LayerKind):
                raise ValueError(f"'{kind}' is not a kind of layer; accepted: {', '.join(get_args(LayerKind))}")
        return limits

    @model_validator(mode="after")
    def _some_budget(self) -> Self:
        if not self.named() and not self.limits:
            raise ValueError(f"name at least one budget of {', '.join(BUDGETS)}, or limits on some of the layers")
        return self


class LatencyRequest(_Strict):
    """By what device's measured times latency is counted."""

    profile: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$", max_length=200)]
    """A device with a stored profile, such as `NVIDIA H100 80GB HBM3`, or the key of one (see GET
    /v1/latency-profiles)."""
    tokens: int = Field(1, ge=1, le=1_000_000, strict=True)
    """Tokens, or images, of one forward pass."""


class Optimizer(_Strict):
    """How configurations are searched, and how many are measured."""

    method: Literal["auto", "ilp", "refine", "evolution"] = "auto"
    """`ilp`: integer programs on the predicted loss, one per metric and budget level. `refine`: then the measurements
    correct the predictions, and what promises most is measured next, as long as evaluations remain. `evolution`: then
    NSGA-II breeds from what is measured. `auto` is `refine`."""
    objective: Literal["loss", "size_mb", "avg_bits", "gbitops", "latency_ms"] = "loss"
    """What the best point has least of, among those that keep every budget. With a cost, `budgets.loss_increase` says
    how much loss is allowed: the smallest model that loses no more."""
    points: int = Field(20, ge=1, le=200, strict=True)
    """Budget levels that are swept."""
    evaluations: int = Field(64, ge=1, le=10_000, strict=True)
    """Most configurations to measure on the calibration data. The uniform baselines come first and are always measured;
    the best of every level are measured again on two further splits, to be accepted and reported."""


class CostRequest(_Strict):
    """What the costs of configurations depend on: the model, the runtime, the schemes, and the device that is timed."""

    model: ModelName
    """A registered name (see GET /v1/models) or a Hugging Face id such as `org/name`."""
    target: str = "generic"
    """The runtime that will load the result; it decides which layers must share a scheme."""
    space: SpaceRequest = Field(default_factory=SpaceRequest)
    latency: LatencyRequest | None = None
    """Left out: latency is neither counted nor bounded."""

    @property
    def counts_latency(self) -> bool:
        """Whether latency is counted."""
        return self.latency is not None

    @model_validator(mode="before")
    @classmethod
    def _schemes_of_the_target(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        target, space = given.get("target"), given.get("space", {})
        if not (isinstance(target, str) and target in TARGETS and isinstance(space, dict) and "schemes" not in space):
            return given
        return given | {"space": space | {"schemes": TARGETS[target].default_schemes}}

    @field_validator("target")
    @classmethod
    def _known_target(cls, target: str) -> str:
        if target not in TARGETS:
            raise ValueError(f"'{target}' is not a target; accepted: {', '.join(sorted(TARGETS))}")
        return target

    @model_validator(mode="after")
    def _latency_of_whole_layers(self) -> Self:
        if self.latency is not None and self.space.granularity == "channels":
            raise InvalidRequest(
                "latency is measured of whole layers; a kernel does not multiply by some of their channels alone",
                field="latency",
                value=self.latency.profile,
                accepted="granularity 'layer' or 'block', or no latency",
            )
        return self


class SearchRequest(CostRequest):
    """A model and a budget; everything else has a default."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "all-minilm-l6-v2", "target": "vllm", "budgets": {"avg_bits": 5.25}},
                {
                    "model": "all-minilm-l6-v2",
                    "target": "vllm",
                    "calibration": {"dataset": "python-docs", "samples": 32, "sequence_length": 128, "seed": 0},
                    "space": {"schemes": ["w4a16g64", "w6a16g64", "w8a16g64"], "quantizer": "mse"},
                    "budgets": {"avg_bits": 5.25, "size_mb": 40},
                    "sensitivity": ["fisher", "kl"],
                    "optimizer": {"method": "auto", "points": 20, "evaluations": 64},
                },
            ]
        },
    )

    calibration: Calibration = Field(default_factory=Calibration)
    budgets: Budgets
    sensitivity: tuple[MetricName, ...] = Field(("fisher", "kl"), min_length=1, max_length=64)
    """Metrics that predict the loss; each fills its own table and proposes its own configurations."""
    optimizer: Optimizer = Field(default_factory=Optimizer)

    @property
    def counts_latency(self) -> bool:
        """Whether latency is counted: a device is named, or a budget, a limit or the objective is on it."""
        bounds = (self.budgets, *self.budgets.limits.values())
        bounded = self.optimizer.objective == "latency_ms" or any("latency_ms" in bound.named() for bound in bounds)
        return super().counts_latency or bounded

    @model_validator(mode="after")
    def _loss_bounded_where_a_cost_is_sought(self) -> Self:
        objective = self.optimizer.objective
        if objective != "loss" and self.budgets.loss_increase is None:
            raise InvalidRequest(
                f"the least {objective} without a limit on the loss is what the cheapest schemes have",
                field="optimizer.objective",
                value=objective,
                accepted=f"'loss', or {objective} together with budgets.loss_increase",
            )
        return self

    @field_validator("sensitivity")
    @classmethod
    def _each_once(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(metrics))

    @field_validator("sensitivity")
    @classmethod
    def _see_channels(cls, metrics: tuple[str, ...], about: ValidationInfo) -> tuple[str, ...]:
        space = about.data.get("space")
        if space is not None and space.granularity == "channels":
            for name in metrics:
                if "whole layers" in METRICS[name].needs:
                    raise InvalidRequest(
                        f"{name} looks at what whole layers give, and says nothing of some of their channels",
                        field="sensitivity",
                        value=name,
                        accepted=[other for other, metric in METRICS.items() if "whole layers" not in metric.needs],
                    )
        return metrics
