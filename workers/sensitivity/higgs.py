"""HIGGS (Malinovskii et al., 2411.17525): measured response to Gaussian noise × relative squared rounding error.

    ΔL_l(s) ≈ α_l · ‖Q(W_l) − W_l‖² / ‖W_l‖²        α_l = argmin_α Σ_t (L_l(t) − α·t²)²

(the linearity theorem, eq. 4, and its coefficients, section 4). L_l(t) is the measured divergence with noise of
relative size t in the layer's weights, t·‖W‖/√n·N(0, 1), all others at full precision; each batch has noise of its own.
The fit goes through the origin, as the divergence of the model from itself is zero. The paper speaks of weights only;
here a rounded input is treated alike: noise of relative size t in every token, times the mean over tokens of
‖Q(x) − x‖² / ‖x‖². Blocks before a layer are not run again (`variants`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from zlib import crc32

import torch
from torch import Tensor

from search.scheme import Scheme
from workers.calibration import Batch
from workers.evaluator import Evaluator, kept_tokens, token_dims
from workers.quantizers.activation import round_activation
from workers.sensitivity.rounding import rounding_errors, weight_only
from workers.sensitivity.table import Entry, Subject, Table, metric, sum_of_layers
from workers.sensitivity.variants import Variant, Walk, blocks_before, stretches
from workers.tasks import Compute, Item, Result, Task

LEVELS = (0.04, 0.07, 0.1)
"""Relative sizes of the noise: those of 6- to 4-bit rounding."""


@metric("higgs")
def higgs(compute: Compute, subject: Subject) -> Table:
    """Predicted loss increase of every unit at every allowed scheme; an item is a stretch of the network."""
    space = subject.space
    widths = [
        sorted(
            {
                s.activation_bits
                for s, open_ in zip(space.schemes, row, strict=True)
                if open_ and s.quantizes_activations
            }
        )
        for row in space.allowed
    ]
    measurements = [len(unit.layers) * (1 + bool(found)) for unit, found in zip(space.units, widths, strict=True)]
    items: list[Item] = [
        {
            "layers": {layer.name: widths[row] for row in rows for layer in space.units[row].layers},
            "levels": list(LEVELS),
            "seed": 0,
        }
        for rows in stretches(space.units, measurements)
    ]
    responses = {name: found for result in compute(RESPONSES, items) for name, found in result.items()}
    rounding = rounding_errors(compute, space)

    def entry(layer: str, scheme: Scheme) -> Entry:
        found = responses[layer]
        weight = activation = variance = 0.0
        if scheme.quantizes_weights:
            relative = rounding[layer][weight_only(scheme)] / max(found["square"], 1e-300)
            weight, variance = found["weight"][0] * relative, found["weight"][1] * relative**2
        if scheme.quantizes_activations:
            relative = found["relative"][str(scheme.activation_bits)]
            activation = found["input"][0] * relative
            variance += found["input"][1] * relative**2
        return Entry(weight, activation, variance)

    return Table.of(space, sum_of_layers(entry), {"alpha": {name: one["weight"][0] for name, one in responses.items()}})


def slope(levels: Tensor, losses: Tensor) -> tuple[float, float]:
    """The α of losses ≈ α·t² (levels × samples, by least squares), and the variance of its mean over samples.

    To the spread of the samples comes that of the levels about the line: noise drawn, and what is not quadratic.
    """
    x = levels.square()
    slopes = x @ losses / x.square().sum()
    alpha = slopes.mean()
    variance = torch.zeros((), dtype=losses.dtype)
    if losses.shape[1] > 1:
        variance = variance + slopes.var() / losses.shape[1]
    if len(levels) > 1:
        residuals = losses.mean(dim=1) - alpha * x
        variance = variance + residuals.square().sum() / (len(levels) - 1) / x.square().sum()
    return float(alpha), float(variance)


@torch.no_grad()
def _responses(evaluator: Evaluator, item: Item) -> Result:
    evaluator.apply({})
    before = blocks_before(evaluator, item["layers"])
    layers = sorted(item["layers"], key=before.__getitem__)
    found = {name: _Response(evaluator, name, item) for name in layers}
    for index in range(len(evaluator.batches("calibration"))):
        walk = Walk(evaluator, index)
        for name in layers:
            walk.move(before[name])
            found[name].measure(walk, index)
    return {name: response.to_json() for name, response in found.items()}


class _Response:
    """How the loss responds to noise in a layer's weight and, where it is rounded to some widths, in its input."""

    def __init__(self, evaluator: Evaluator, name: str, item: Item) -> None:
        self._evaluator = evaluator
        self._name = name
        self._widths: list[int] = item["layers"][name]
        self._levels: list[float] = item["levels"]
        self._seed = item["seed"]
        self._losses: list[Tensor] = []
        self._errors: dict[int, list[Tensor]] = {width: [] for width in self._widths}

    def measure(self, walk: Walk, index: int) -> None:
        """Keep the losses of a batch."""
        noises = [partial(self._noise, f"{self._seed} {self._name} {index} {level}") for level in self._levels]
        pairs = list(zip(self._levels, noises, strict=True))
        variants = [Variant({self._name: partial(_noisy_weight, level, noise)}) for level, noise in pairs]
        if self._widths:
            changes = [partial(self._noisy_input, level, noise, walk.batch) for level, noise in pairs]
            variants += [Variant({}, {self._name: change}) for change in changes]
        self._losses.append(torch.stack(walk.losses(variants)))

    def to_json(self) -> Result:
        """ "weight" and "input": [α, its variance]; "relative": width → relative squared error of the rounded input;
        "square": ‖W‖²."""
        losses, levels = torch.cat(self._losses, dim=1), torch.tensor(self._levels, dtype=torch.float64)
        parts = dict(zip(("weight", "input"), torch.split(losses.cpu(), len(levels)), strict=False))
        return {
            **{part: slope(levels, measured) for part, measured in parts.items()},
            "relative": {str(width): float(torch.stack(found).mean()) for width, found in self._errors.items()},
            "square": float(self._evaluator.layers[self._name].weight.double().square().sum()),
        }

    def _noise(self, key: str, like: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(crc32(key.encode()))
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def _noisy_input(self, level: float, noise: Callable[[Tensor], Tensor], batch: Batch, x: Tensor) -> Tensor:
        dims = token_dims(self._evaluator.layers[self._name].module, x)
        tokens = x.flatten(-dims)
        square = tokens.square().sum(-1, keepdim=True)
        if level == self._levels[0]:
            kept = kept_tokens(batch, x)
            weights = torch.ones_like(square) if kept is None else kept.view_as(square)
            for width, found in self._errors.items():
                error = (round_activation(tokens, width) - tokens).square().sum(-1, keepdim=True)
                found.append((weights * error / square.clamp_min(1e-30)).double().sum() / weights.sum())
        return (tokens + level * (square / tokens.shape[-1]).sqrt() * noise(tokens)).view_as(x)


def _noisy_weight(level: float, noise: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    return weight + level * weight.square().mean().sqrt() * noise(weight)


RESPONSES = Task("higgs", 2, _responses)
"""Item: a stretch's layers with the bits to which their inputs are rounded, levels of noise, a seed. Result: layer → as
`_Response.to_json` has it."""
