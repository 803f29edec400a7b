"""Measured divergence: the loss with one unit at a scheme and all others at full precision.

Blocks before the unit's own are not run again: a batch walks through the blocks once, and from each block on, every
unit in it is measured at every scheme (exact). A scheme that rounds activations is measured with activations kept, too:
what that lacks is what rounding activations adds.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from search.measurement import metrics
from search.scheme import FULL_PRECISION, Scheme
from search.space import Space, Unit
from workers.evaluator import Evaluator, token_dims
from workers.quantizers.activation import round_activation
from workers.sensitivity.rounding import weight_only
from workers.sensitivity.table import Entry, Subject, Table, metric
from workers.sensitivity.variants import Variant, Walk, blocks_before, stretches
from workers.tasks import Compute, Item, Result, Task

RELATIVE_ERROR = 0.15
"""An item's batches stop, after two, when the mean relative standard error of its divergences is below this."""


@metric("kl")
def kl(compute: Compute, subject: Subject) -> Table:
    """The divergence of every unit at every allowed scheme, on the calibration split."""
    space = subject.space
    results = compute(DIVERGENCE, items(space))
    found = {name: losses for result in results for name, losses in result.items()}

    def entry(unit: Unit, scheme: Scheme) -> Entry:
        if scheme == FULL_PRECISION:
            return Entry(0.0)
        mean, error = found[unit.name][str(scheme)]
        weights = min(found[unit.name][weight_only(scheme)][0], mean)
        return Entry(weights, mean - weights, error**2)

    return Table.of(space, entry)


def items(space: Space, relative_error: float = RELATIVE_ERROR) -> list[Item]:
    """What is measured, stretch by stretch of the network."""
    units = [_measured(unit, row, space) for row, unit in enumerate(space.units)]
    return [
        {"units": [units[row] for row in rows], "relative_error": relative_error}
        for rows in stretches(space.units, [len(unit["schemes"]) for unit in units])
    ]


def _measured(unit: Unit, row: int, space: Space) -> Item:
    allowed = [scheme for scheme, open_ in zip(space.schemes, space.allowed[row], strict=True) if open_]
    schemes = {text for scheme in allowed for text in (str(scheme), weight_only(scheme))} - {str(FULL_PRECISION)}
    return {"name": unit.name, "layers": [layer.name for layer in unit.layers], "schemes": sorted(schemes)}


@torch.no_grad()
def _divergence(evaluator: Evaluator, item: Item) -> Result:
    evaluator.apply({})
    before = blocks_before(evaluator, [layer for unit in item["units"] for layer in unit["layers"]])
    starts = {unit["name"]: min(before[layer] for layer in unit["layers"]) for unit in item["units"]}
    units = sorted(item["units"], key=lambda unit: starts[unit["name"]])
    losses: dict[tuple[str, str], list[Tensor]] = {}
    for index in range(len(evaluator.batches("calibration"))):
        walk = Walk(evaluator, index)
        for unit in units:
            walk.move(starts[unit["name"]])
            variants = [_rounded(evaluator, unit["layers"], Scheme.parse(text)) for text in unit["schemes"]]
            found = walk.losses(variants)
            for text, loss in zip(unit["schemes"], found, strict=True):
                losses.setdefault((unit["name"], text), []).append(loss)
        if index and _relative_error(list(losses.values())) < item["relative_error"]:
            break
    evaluator.apply({})
    result: Result = {unit["name"]: {} for unit in units}
    for (name, text), found in losses.items():
        told = metrics({"loss": torch.cat(found).tolist()})
        result[name][text] = [told["loss"], told["loss_stderr"]]
    return result


def _rounded(evaluator: Evaluator, layers: list[str], scheme: Scheme) -> Variant:
    """All of `layers` at `scheme`."""
    weights = {name: partial(_weight, evaluator, name, scheme) for name in layers}
    inputs = {name: partial(_input, evaluator, name, scheme) for name in layers}
    return Variant(weights, inputs if scheme.quantizes_activations else {})


def _weight(evaluator: Evaluator, name: str, scheme: Scheme, _weight: Tensor) -> Tensor:
    return evaluator.weight(name, scheme)


def _input(evaluator: Evaluator, name: str, scheme: Scheme, x: Tensor) -> Tensor:
    return round_activation(x, scheme.activation_bits, token_dims(evaluator.layers[name].module, x))


def _relative_error(losses: list[list[Tensor]]) -> float:
    if not losses:
        return 0.0
    samples = torch.stack([torch.cat(found) for found in losses])
    error = samples.std(dim=1) / samples.shape[1] ** 0.5
    return float((error / samples.mean(dim=1).clamp_min(1e-300)).clamp(0, 1).mean())


DIVERGENCE = Task("kl", 2, _divergence)
"""Item: units with their schemes. Result: unit → scheme → [mean, standard error]."""
