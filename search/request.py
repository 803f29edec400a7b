"""What a person may ask: the body of POST /v1/searches. Unknown fields are refused; every field says what it takes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from search.budget import BUDGETS
from search.metrics import MetricName
from search.scheme import Scheme
from search.targets import TARGETS

ModelName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=200),
]
Pattern = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$", max_length=300)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Calibration(_Strict):
    """The data on which the loss is measured. Two further, disjoint splits of the same size decide what is accepted, and
    what is reported."""

    dataset: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=200)] | None = None
    """`python-docs` (built in), the name of a file or folder in the data sets folder, or a Hugging Face data set
    id. Left out: `python-docs` for text models; image models have no default."""
    samples: int = Field(32, ge=2, le=4096)
    """Sequences or images per split."""
    sequence_length: int = Field(256, ge=8, le=8192)
    """Tokens per sequence (text models only)."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Which samples are drawn, and which go to which split."""


class SpaceRequest(_Strict):
    """Which schemes each layer may take."""

    schemes: tuple[str, ...] = Field(("w4a16g64", "w5a16g64", "w6a16g64", "w8a16g64"), min_length=1, max_length=32)
    """Schemes open to every layer, for example `w4a16g64`."""
    quantizer: Literal["rtn", "mse"] = "rtn"
    """`rtn` rounds to the min-max grid; `mse` clips each group where its squared error is least."""
    ignore: tuple[Pattern, ...] = ("lm_head",)
    """Layers to leave at full precision, by name or glob (`*.classifier`)."""
    pin: dict[Pattern, str] = Field(default_factory=dict)
    """Layers whose scheme is settled, by name or glob: `{"*.down_proj": "w8a16g64"}`."""

    @field_validator("schemes")
    @classmethod
    def _known_schemes(cls, schemes: tuple[str, ...]) -> tuple[str, ...]:
        parsed = [Scheme.parse(text) for text in schemes]
        return tuple(str(scheme) for scheme in sorted(set(parsed)))

    @field_validator("pin")
    @classmethod
    def _known_pins(cls, pin: dict[str, str]) -> dict[str, str]:
        return {pattern: str(Scheme.parse(text, "space.pin")) for pattern, text in pin.items()}


class Budgets(_Strict):
    """Upper bounds, all of which hold. At least one is named."""

    avg_bits: float | None = Field(None, gt=0, le=1e12, allow_inf_nan=False)
    """Stored bits per searched weight; scales and zero points are counted (w4a16g64 is 4.25)."""
    size_mb: float | None = Field(None, gt=0, le=1e12, allow_inf_nan=False)
    """The whole model in 10⁶ bytes: searched layers at their schemes, everything else at 16 bits."""
    gbitops: float | None = Field(None, gt=0, le=1e12, allow_inf_nan=False)
    """10⁹ bit operations for one token or one image: MACs × weight bits × activation bits."""
    loss_increase: float | None = Field(None, gt=0, le=1e12, allow_inf_nan=False)
    """Measured divergence from full precision on the held-out split."""

    @model_validator(mode="after")
    def _some_budget(self) -> Self:
        if not self.named():
            raise ValueError(f"name at least one budget of {', '.join(BUDGETS)}")
        return self

    def named(self) -> dict[str, float]:
        """The budgets that were given, by name."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Optimizer(_Strict):
    """How configurations are searched, and how many are measured."""

    method: Literal["auto", "ilp"] = "auto"
    """`ilp`: integer programs on the predicted loss, one per metric and budget level. `auto` is `ilp`."""
    points: int = Field(20, ge=1, le=200)
    """Budget levels swept by each metric's integer program."""
    evaluations: int = Field(64, ge=1, le=10_000)
    """Most configurations to measure. The uniform baselines come first and are always measured."""


class SearchRequest(_Strict):
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

    model: ModelName
    """A registered name (see GET /v1/models) or a Hugging Face id such as `org/name`."""
    target: str = "generic"
    """The runtime that will load the result; it decides which layers must share a scheme."""
    calibration: Calibration = Field(default_factory=Calibration)
    space: SpaceRequest = Field(default_factory=SpaceRequest)
    budgets: Budgets
    sensitivity: tuple[MetricName, ...] = Field(("fisher", "kl"), min_length=1)
    """Metrics that predict the loss; each fills its own table and proposes its own configurations."""
    optimizer: Optimizer = Field(default_factory=Optimizer)

    @field_validator("target")
    @classmethod
    def _known_target(cls, target: str) -> str:
        if target not in TARGETS:
            raise ValueError(f"'{target}' is not a target; accepted: {', '.join(sorted(TARGETS))}")
        return target

    @field_validator("sensitivity")
    @classmethod
    def _each_once(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(metrics))
