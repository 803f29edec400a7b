"""Layer-wise relevance propagation: how much of the model's answer passes through each layer.

With the relevance R = y ⊙ g of a layer's output y, g being the gradient that the rules of `rules` give it,

    importance_l = Σ|R_l| / Σ_l Σ|R_l|        loss_l(s) ∝ importance_l · ‖Q_s(W_l) − W_l‖² / ‖W_l‖²

and for rounded inputs importance_l · ‖Q_s(x_l) − x_l‖² / ‖x_l‖², sample by sample and then averaged. That a layer's
relevance says how many bits it needs is the idea of LRP-QViT (Ranjan & Savakis, 2401.11243); the relative rounding
error, which tells schemes apart, is ours. Σ and not the mean over a layer's outputs, because it is sums that relevance
conserves: a mean takes from wide layers what passes through them, and agrees less with what is measured. The values
rank units and schemes; they are not in units of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search.scheme import Scheme
from search.space import Unit
from workers.calibration import Batch
from workers.evaluator import Evaluator, kept_tokens, token_dims
from workers.hooks import removing
from workers.quantizers.activation import round_activation
from workers.sensitivity.lrp.relevance import propagate, treatments
from workers.sensitivity.rounding import rounding_errors, weight_only
from workers.sensitivity.table import Entry, Subject, Table, metric
from workers.tasks import Compute, Item, Result, Task

PIECES = 4
"""The calibration split is cut into at least so many items, where it has so many samples."""


@metric("lrp")
def lrp(compute: Compute, subject: Subject) -> Table:
    """Every unit's importance times its relative rounding error, its layers added up."""
    space = subject.space
    layers = [layer.name for layer in space.layers]
    rounding = (space.allowed & [scheme.quantizes_activations for scheme in space.schemes]).any(axis=1)
    rounded = [layer.name for unit in np.array(space.units)[rounding] for layer in unit.layers]
    widths = sorted({scheme.activation_bits for scheme in space.schemes if scheme.quantizes_activations})
    results = compute(
        RELEVANCE,
        [
            {"batch": batch, "samples": samples, "layers": layers, "inputs": rounded, "activation_bits": widths}
            for batch, samples in _pieces(subject.batch_sizes)
        ],
    )
    (squares,) = compute(SQUARED_WEIGHTS, [{"layers": layers}])
    errors = rounding_errors(compute, space)

    def samples(part: str) -> Any:
        return np.array([sample for result in results for sample in result[part]])

    shares = samples("relevance")
    shares /= shares.sum(axis=1, keepdims=True).clip(1e-300)
    importance = dict(zip(layers, shares.T, strict=True))
    inputs = {width: dict(zip(rounded, samples(f"a{width}").T, strict=True)) for width in widths}

    def entry(unit: Unit, scheme: Scheme) -> Entry:
        weight = activation = np.zeros(len(shares))
        for layer in (layer.name for layer in unit.layers):
            if scheme.quantizes_weights and squares[layer]:
                weight = weight + importance[layer] * errors[layer][weight_only(scheme)] / squares[layer]
            if scheme.quantizes_activations:
                activation = activation + importance[layer] * inputs[scheme.activation_bits][layer]
        variance = (weight + activation).var(ddof=1) / len(shares) if len(shares) > 1 else 0.0
        return Entry(float(weight.mean()), float(activation.mean()), float(variance))

    plain = sorted({operation for result in results for operation in result["plain_gradient"]})
    details = {
        "importance": {name: float(share.mean()) for name, share in importance.items()},
        "conservation": float(samples("entering").sum() / (samples("answer").sum() or 1)),
        "plain_gradient": plain,
    }
    return Table.of(
        space, entry, details, [f"no relevance rule for {name}: its plain gradient was used" for name in plain]
    )


def _pieces(batch_sizes: tuple[int, ...]) -> Iterator[tuple[int, list[int]]]:
    """(batch, [its first sample, one past the last])."""
    for batch, size in enumerate(batch_sizes):
        step = -(-size * len(batch_sizes) // PIECES)
        for start in range(0, size, step):
            yield batch, [start, min(start + step, size)]


def _relevance(evaluator: Evaluator, item: Item) -> Result:
    """One sample at a time: some tensors, such as learned positions, have no dimension of samples."""
    evaluator.apply({})
    batch = evaluator.batches("calibration")[item["batch"]]
    samples = [{key: value[k : k + 1] for key, value in batch.items()} for k in range(*item["samples"])]
    treated = treatments(evaluator, samples[0])
    plain: set[str] = set()
    result: Result = {"relevance": [], "entering": [], "answer": [], **{f"a{n}": [] for n in item["activation_bits"]}}
    for sample in samples:
        with _rounded(evaluator, item["inputs"], item["activation_bits"], sample) as errors:
            found = propagate(evaluator, item["layers"], sample, treated)
        result["relevance"].append([found.layers[layer] for layer in item["layers"]])
        result["entering"].append(found.entering)
        result["answer"].append(found.answer)
        for width in item["activation_bits"]:
            result[f"a{width}"].append([errors[layer, width] / (errors[layer, 16] or 1) for layer in item["inputs"]])
        plain |= found.plain
    return result | {"plain_gradient": sorted(plain)}


@contextmanager
def _rounded(
    evaluator: Evaluator, layers: list[str], widths: list[int], batch: Batch
) -> Iterator[dict[tuple[str, int], float]]:
    """(layer, width in bits) → ‖Q(x) − x‖² of the inputs within; (layer, 16) → ‖x‖²."""
    errors = {(layer, width): 0.0 for layer in layers for width in (*widths, 16)}

    @torch.no_grad()
    def enter(layer: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if (kept := kept_tokens(batch, x)) is not None:
            x = x * kept
        errors[layer, 16] += float(x.double().square().sum())
        for width in widths:
            change = round_activation(x, width, token_dims(module, x)) - x
            errors[layer, width] += float(change.double().square().sum())

    hooks = [
        module.register_forward_pre_hook(partial(enter, layer))
        for layer in layers
        for module in evaluator.modules_that_round(layer)
    ]
    with removing(hooks):
        yield errors


def _squared_weights(evaluator: Evaluator, item: Item) -> Result:
    return {name: float(evaluator.layers[name].parameter.detach().double().square().sum()) for name in item["layers"]}


RELEVANCE = Task("lrp.relevance", 2, _relevance)
"""Item: some samples of a batch, layers, those whose inputs are rounded, and to how many bits. Result, by sample:
each layer's Σ|R| ("relevance"), the relative rounding error of each input ("a8", …), ΣR of the pixels or embeddings
("entering"), what was explained ("answer"); and the operations without a rule ("plain_gradient")."""

SQUARED_WEIGHTS = Task("lrp.squared_weights", 1, _squared_weights, uses_data=False)
"""Item: layers. Result: layer → ‖W‖²."""
