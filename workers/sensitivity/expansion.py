"""The loss near a configuration: its gradient and its curvature there.

With every layer rounded as an allocation says, to ŵ = w + e, a further change δ of the weights gives

    L(ŵ + δ) ≈ L(ŵ) + gᵀδ + ½ δᵀ diag(E[G²]) δ

g is the gradient of the divergence at the rounded model, about H·e: its product with what one unit would change holds
that unit's interactions with the errors of all others, of which a sensitivity at full precision knows nothing. E[G²] is
the Fisher diagonal there (`sampled` describes G). Inputs alike: a layer's input x, rounded to Q_a(x), would change to
another Q(x), and gradients pass the rounding straight through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from search import allocation
from search.expansion import FOLDS, Expansion
from search.scheme import FULL_PRECISION, Scheme
from search.space import Space
from search.sweep import Choice
from workers.calibration import Batch, sample_count
from workers.evaluator import Evaluator, token_dims
from workers.loss import gradient, score
from workers.quantizers.activation import round_activation
from workers.sensitivity.backward import gradient_scale, micro_batches_of_split, shards, visiting
from workers.sensitivity.rounding import weight_only
from workers.tasks import Compute, Item, Result, Task

SEED = 0


def expansion(compute: Compute, space: Space, batch_sizes: Sequence[int], choice: Choice) -> Expansion:
    """The expansion of the loss at an allocation, from a backward pass over the calibration data and, over its first
    fold, another; each item is a fold."""
    asked: Item = {
        "allocation": allocation.to_json(allocation.layer_schemes(space, choice)),
        "schemes": _schemes(space),
        "seed": SEED,
    }
    items = [
        asked | {"start": start, "stop": stop, "curvature": start == 0}
        for start, stop in shards(sum(batch_sizes), FOLDS)
    ]
    results = compute(EXPANSION, items)
    first = np.array([_table(space, choice, result["gradient"]) for result in results])
    return Expansion(choice, first, _table(space, choice, results[0]["curvature"]))


def _schemes(space: Space) -> dict[str, list[str]]:
    """What each layer may change to; layers without a choice are left out."""
    return {
        layer.name: [str(scheme) for scheme, open_ in zip(space.schemes, row, strict=True) if open_]
        for unit, row in zip(space.units, space.allowed, strict=True)
        if row.sum() > 1
        for layer in unit.layers
    }


def _table(space: Space, choice: Choice, found: dict[str, dict[str, float | None]]) -> NDArray[np.float64]:
    """Units × schemes: 0 at the choice, inf where a choice is closed or has no finite number."""
    table = np.where(space.allowed, 0.0, np.inf)
    for row, (unit, chosen) in enumerate(zip(space.units, choice, strict=True)):
        for column, scheme in enumerate(space.schemes):
            if space.allowed[row, column] and column != chosen:
                values = [found[layer.name][str(scheme)] for layer in unit.layers]
                table[row, column] = math.inf if None in values else sum(value or 0.0 for value in values)
    return table


def _expansion(evaluator: Evaluator, item: Item) -> Result:
    evaluator.apply(allocation.from_json(item["allocation"]))
    generator = torch.Generator(evaluator.loaded.device).manual_seed(item["seed"] * 1_000_003 + item["start"])
    task = evaluator.loaded.task

    def away(batch: Batch, output: Tensor, reference: Tensor) -> Tensor:
        """Gradient of the mean divergence."""
        return gradient(task, output, reference, batch.get("attention_mask")) / len(output)

    def anywhere(batch: Batch, output: Tensor, _reference: Tensor) -> Tensor:
        return score(task, output, batch.get("attention_mask"), generator)

    result = {"gradient": _changes(evaluator, item, away, lambda g, change: float((g * change).sum()))}
    if item["curvature"]:
        result["curvature"] = _changes(evaluator, item, anywhere, lambda g, c: float((g * c).square_().sum()) / 2)
    return result


def _changes(
    evaluator: Evaluator,
    item: Item,
    start: Callable[[Batch, Tensor, Tensor], Tensor],
    of: Callable[[Tensor, Tensor], float],
) -> dict[str, dict[str, float | None]]:
    """Layer → scheme → mean over a fold's samples of `of`(gradient, change), the backward pass beginning with what
    `start` makes of an output and the full-precision one; None where that is not finite."""
    layers, scale = evaluator.layers, gradient_scale(evaluator)
    applied = allocation.from_json(item["allocation"])
    sums = {name: dict.fromkeys(schemes, 0.0) for name, schemes in item["schemes"].items()}
    share = 1.0

    def add(name: str, schemes: Iterable[Scheme], value: float) -> None:
        for scheme in schemes:
            sums[name][str(scheme)] += share * value

    def weight(name: str, g: Tensor) -> None:
        for text, schemes in groupby(sorted(map(Scheme.parse, sums[name])), key=weight_only):
            change = evaluator.weight(name, Scheme.parse(text)) - layers[name].weight
            add(name, schemes, of(g.float() / scale, change.float()))

    def entered(name: str, x: Tensor, g: Tensor) -> None:
        def rounded(bits: int) -> Tensor:
            return x if bits == 16 else round_activation(x, bits, token_dims(layers[name].module, x))

        now = applied.get(name, FULL_PRECISION).activation_bits
        width = attrgetter("activation_bits")
        for bits, those in groupby(sorted(map(Scheme.parse, sums.get(name, ())), key=width), key=width):
            if bits != now:
                add(name, those, of(g.float() / scale, (rounded(bits) - rounded(now)).float()))

    inputs = entered if any(Scheme.parse(text).quantizes_activations for one in sums.values() for text in one) else None
    parts = list(micro_batches_of_split(evaluator, item["start"], item["stop"]))
    for index, same in groupby(parts, key=lambda part: part[1]):
        reference = evaluator.reference("calibration", index)
        for batch, _, chosen in same:
            share = sample_count(batch) / (item["stop"] - item["start"])
            with visiting(evaluator, sums, weight=weight, entered=inputs):
                output = evaluator.loaded(batch)
                if output.requires_grad:
                    head = start(batch, output.detach(), reference[chosen])
                    torch.autograd.backward(output, head.mul_(scale).to(output))
    return {
        name: {text: value if math.isfinite(value) else None for text, value in found.items()}
        for name, found in sums.items()
    }


EXPANSION = Task("expansion", 1, _expansion)
"""Item: an `allocation`, the `schemes` that each layer may change to, a fold of the calibration samples (`start` to
`stop`), whether the `curvature` is wanted, a seed. Result: `gradient` (Σ g·δ) and, if wanted, `curvature`
(½ Σ G²·δ²): layer → scheme → mean over the fold's samples, null where it is not finite."""
