"""The sensitivity metrics a person may ask for: what each one says, needs and costs. `workers/sensitivity/` computes
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from search.scheme import FULL_PRECISION

if TYPE_CHECKING:
    from search.space import Space

Need = Literal["weights", "data", "gradients", "forward derivatives", "double backward", "labels", "whole layers"]

Evidence = Literal["measured", "integrated", "second order", "first order", "relevance", "weights", "control"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A way to predict the loss increase of a unit at a scheme.

    `in_loss_units`: whether the values are predicted losses, or only rank units and schemes. `sees_activations`:
    whether rounded activations count. `forward_passes(space)` is the cost in forward passes over the calibration split,
    a backward pass counting as two; `version` is raised when its tables change. A metric that needs "whole layers" says
    nothing of single output channels.
    """

    name: str
    title: str
    evidence: Evidence
    needs: tuple[Need, ...]
    forward_passes: Callable[[Space], float]
    in_loss_units: bool = True
    sees_activations: bool = True
    version: int = 1


BACKWARD = 3.0
"""A forward and a backward pass, in forward passes."""

PROBE = 6.5
"""A forward derivative, then a backward pass: as measured on MiniLM, where plain operations replace fused ones."""


def _schemes(space: Space) -> int:
    return int(space.allowed.any(axis=0).sum())


def _choices(space: Space) -> int:
    return int(space.allowed.sum())


def _measurements(space: Space) -> int:
    """Choices that round something; those of activations are measured with their weights alone, too."""
    count = 0
    for row in space.allowed:
        asked = {scheme for scheme, open_ in zip(space.schemes, row, strict=True) if open_}
        count += len((asked | {replace(scheme, activation_bits=16) for scheme in asked}) - {FULL_PRECISION})
    return count


def _rounds_inputs(space: Space) -> bool:
    return any(scheme.quantizes_activations for scheme in space.schemes)


def _convolutions(space: Space) -> int:
    return sum(layer.kind == "conv" for layer in space.layers)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "kl",
            "Measured divergence: one unit at a scheme, all others at full precision",
            "measured",
            ("data",),
            lambda space: 0.5 * _measurements(space),
            version=3,
        ),
        Metric(
            "hessian_trace",
            "Average Hessian trace × squared perturbation (HAWQ-V2, arXiv 1911.03852), of the divergence",
            "second order",
            ("data", "forward derivatives", "gradients"),
            lambda space: 4 * PROBE,
            version=3,
        ),
        Metric(
            "hessian_trace_labels",
            "Average Hessian trace × squared perturbation (HAWQ-V2), of the loss on labels",
            "second order",
            ("data", "labels", "double backward"),
            lambda space: 2 * BACKWARD + 4 * PROBE,
            version=2,
        ),
        Metric(
            "fisher",
            "Fisher diagonal: ½ Σ E[g²]·Δw², labels sampled from the model",
            "second order",
            ("data", "gradients"),
            lambda space: 1 + BACKWARD,
            version=2,
        ),
        Metric(
            "gauss_newton",
            "Signed Gauss-Newton sketch: ½ E[(gᵀΔ)²] of a unit with the interactions of its weights",
            "second order",
            ("data", "gradients"),
            lambda space: BACKWARD + 1 + _schemes(space),
            version=2,
        ),
        Metric(
            "pqi",
            "Post-quantization integral (arXiv 2503.01901) along the joint path to each uniform scheme, signed",
            "integrated",
            ("data", "gradients"),
            lambda space: (4 * (BACKWARD + 1) + 1) * _schemes(space),
            version=2,
        ),
        Metric(
            "pqi_absolute",
            "Post-quantization integral, absolute values of the elements",
            "integrated",
            ("data", "gradients"),
            lambda space: (4 * (BACKWARD + 1) + 1) * _schemes(space),
            in_loss_units=False,
            version=2,
        ),
        Metric(
            "pqi_single",
            "Post-quantization integral along a path of its own for every unit and scheme",
            "integrated",
            ("data", "gradients"),
            lambda space: 0.5 * (2 * (BACKWARD + 1) + 2) * _choices(space),
            version=2,
        ),
        Metric(
            "lrp",
            "Layer-wise relevance propagation: relevance of a layer × its relative quantization error",
            "relevance",
            ("data", "gradients", "whole layers"),
            lambda space: BACKWARD * (3 if _convolutions(space) > 1 else 1),
            in_loss_units=False,
            version=2,
        ),
        Metric(
            "gradient",
            "ModelOpt's score: Σ (gradient × change of the layer's output)²",
            "first order",
            ("data", "gradients", "whole layers"),
            lambda space: BACKWARD + _schemes(space),
            in_loss_units=False,
            version=2,
        ),
        Metric(
            "autoscheme",
            "AutoRound AutoScheme's score: Σ |gradient × rounding error|, taken at the quantized model",
            "first order",
            ("data", "gradients"),
            lambda space: BACKWARD * _schemes(space),
            in_loss_units=False,
            version=2,
        ),
        Metric(
            "higgs",
            "HIGGS (arXiv 2411.17525): measured response to noise × relative rounding error",
            "measured",
            ("data",),
            lambda space: 0.5 * 3 * len(space.layers) * (2 if _rounds_inputs(space) else 1),
            version=2,
        ),
        Metric(
            "weight_mse",
            "Squared rounding error of the weights",
            "weights",
            ("weights",),
            lambda space: 0.0,
            in_loss_units=False,
            sees_activations=False,
        ),
        Metric(
            "size",
            "Bytes saved: a control that knows nothing of the loss",
            "control",
            (),
            lambda space: 0.0,
            in_loss_units=False,
            sees_activations=False,
        ),
    )
}
"""By name."""

MetricName = Literal[
    "kl",
    "hessian_trace",
    "hessian_trace_labels",
    "fisher",
    "gauss_newton",
    "pqi",
    "pqi_absolute",
    "pqi_single",
    "lrp",
    "gradient",
    "autoscheme",
    "higgs",
    "weight_mse",
    "size",
]
