"""The pass that `fisher` and `gauss_newton` share: gradients of a random score of the model's output.

`workers.loss.score` draws c of a few samples' output with E[c cᵀ] = C, the Hessian of their mean divergence with
respect to the output. Going backwards once gives G = Jᵀc of all layers' weights and inputs, and

    E[G Gᵀ] = JᵀCJ

is the Gauss-Newton matrix of the loss. As the divergence from the model's own output has no gradient at full precision,
it is the loss's Hessian; for a divergence in nats it is also the Fisher matrix, with labels from the model and not from
the data (Martens, 1412.1193, section 9; Kunstner et al., 1905.12558, on the difference). Random signs per sample and
position make one backward pass over all of them unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from search.scheme import Scheme
from search.space import Space, Unit
from workers.calibration import Batch, sample_count
from workers.evaluator import Evaluator, token_dims
from workers.loss import score
from workers.quantizers.activation import round_activation
from workers.sensitivity.accumulators import zeros_for
from workers.sensitivity.backward import LARGE, gradient_scale, is_large, micro_batches_of_split, shards, visiting
from workers.sensitivity.rounding import weight_only
from workers.sensitivity.table import Subject
from workers.tasks import Compute, Item, Result, Task

Array = NDArray[np.float64]

Found = dict[str, dict[str, list[float]]]
"""Layer → weight scheme by name, or width of the rounded input ("a8") → numbers."""

SHARDS = 4
"""The calibration samples are cut into so many contiguous shards, each an item of its own."""

MICRO_BATCHES = 8
"""For the Fisher diagonal alone, samples go together in at least so many micro-batches: their spread is the standard
error. The sketch takes one sample at a time: its rows must not mix samples. They share a pass where both
take as many."""

SEED = 0


def sampled(compute: Compute, subject: Subject, name: str) -> list[Result]:
    """What the pass found for the metric `name`, shard by shard; other metrics of the search share the pass."""
    space, samples = subject.space, sum(subject.batch_sizes)
    scores = sorted(SCORES.keys() & {name, *subject.requested})
    asked: Item = {
        "scores": scores,
        "at_once": {name: 1 if name == "gauss_newton" else math.ceil(samples / MICRO_BATCHES) for name in scores},
        "seed": SEED,
        "weights": _weights(space),
        "inputs": _inputs(space),
    }
    return compute(SAMPLED, [asked | {"start": start, "stop": stop} for start, stop in shards(samples, SHARDS)])


def joined(results: Sequence[Result], *path: str) -> dict[str, dict[str, Array]]:
    """The numbers that the results keep under `path`, layer → key, those of all shards one after the other."""
    parts: list[Found] = []
    for result in results:
        for key in path:
            result = result[key]
        parts.append(result)
    return {
        layer: {key: np.concatenate([part[layer][key] for part in parts]) for key in keys}
        for layer, keys in parts[0].items()
    }


def sum_of(unit: Unit, found: dict[str, dict[str, Array]], key: str) -> Array | float:
    """The sum over a unit's layers of what was found for each under `key`; 0 where nothing was asked."""
    return sum((found[layer.name][key] for layer in unit.layers if key in found.get(layer.name, {})), start=0.0)


def _weights(space: Space) -> dict[str, list[str]]:
    """The ways to round each layer's weight; layers that are only ever kept are left out."""
    return {
        layer.name: names
        for unit, row in zip(space.units, space.allowed, strict=True)
        if (names := _distinct(map(weight_only, _rounding(space, row))))
        for layer in unit.layers
    }


def _inputs(space: Space) -> dict[str, list[int]]:
    """The widths that each layer's input may be rounded to; layers whose inputs are kept are left out."""
    return {
        layer.name: widths
        for unit, row in zip(space.units, space.allowed, strict=True)
        if (widths := sorted({s.activation_bits for s in _rounding(space, row) if s.quantizes_activations}))
        for layer in unit.layers
    }


def _rounding(space: Space, row: NDArray[np.bool_]) -> list[Scheme]:
    return [scheme for scheme, allowed in zip(space.schemes, row, strict=True) if allowed and scheme.quantizes_weights]


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _sampled(evaluator: Evaluator, item: Item) -> Result:
    """One pass for all that may take the same samples at once."""
    evaluator.apply({})

    def at_once(name: str) -> int:
        return 1 if is_large(evaluator) else item["at_once"][name]

    found: Result = {}
    for number, names in groupby(sorted(item["scores"], key=at_once), key=at_once):
        found |= _one_pass(evaluator, item, list(names), number)
    evaluator.apply({})
    return found


def _one_pass(evaluator: Evaluator, item: Item, names: Sequence[str], at_once: int) -> Result:
    """Go backwards from a score of each micro-batch of a shard, and hand the gradients to what was asked for."""
    batches = list(micro_batches_of_split(evaluator, item["start"], item["stop"], at_once))
    sizes = [sample_count(batch) for batch, _, _ in batches]
    scale = gradient_scale(evaluator)
    scores = {name: SCORES[name](evaluator, item, sizes) for name in names}
    squares: Found = {name: {"norm": [0.0] * len(batches)} for name in item["weights"]}

    def weight(at: int, name: str, gradient: Tensor) -> None:
        squares[name]["norm"][at] = float(torch.linalg.vector_norm(gradient, dtype=torch.float32) / scale) ** 2
        for each in scores.values():
            each.weight(at, name, gradient.float(), scale)

    def entered(at: int, name: str, x: Tensor, gradient: Tensor) -> None:
        for bits in item["inputs"].get(name, ()):
            error = round_activation(x, bits, token_dims(evaluator.layers[name].module, x)) - x
            products = gradient.float() * error.float() / scale
            for each in scores.values():
                each.input(at, name, f"a{bits}", products)

    for at, (batch, _, _) in enumerate(batches):
        inputs = partial(entered, at) if item["inputs"] else None
        with visiting(evaluator, item["weights"], weight=partial(weight, at), entered=inputs):
            _go_backwards(evaluator, batch, item["seed"] * 1_000_003 + item["start"] + sum(sizes[:at]), scale)
    return {name: {"sizes": sizes, "squares": squares} | each.result() for name, each in scores.items()}


def _go_backwards(evaluator: Evaluator, batch: Batch, seed: int, scale: float) -> None:
    """From `scale` times a score. Nothing of the output outlives this: logits weigh as much as many layers."""
    generator = torch.Generator(evaluator.loaded.device).manual_seed(seed)
    output = evaluator.loaded(batch)
    if output.requires_grad:
        c = score(evaluator.loaded.task, output.detach(), batch.get("attention_mask"), generator)
        torch.autograd.backward(output, c.mul_(scale).to(output))


class _Score(Protocol):
    """What is made of the gradients G of a shard's micro-batches, of `sizes` samples each."""

    def __init__(self, evaluator: Evaluator, item: Item, sizes: Sequence[int]) -> None: ...

    def weight(self, at: int, name: str, gradient: Tensor, scale: float) -> None:
        """Take `scale`·G of a layer's weight, of micro-batch `at`."""

    def input(self, at: int, name: str, width: str, products: Tensor) -> None:
        """Take G·(Q(x) − x), element by element, of one use of a layer with input x."""

    def result(self) -> Result:
        """All numbers: `weights` and `inputs`, both `Found`."""


class _Fisher:
    """½ Σ E[G²]·Δ²: of weights the mean over the shard, of inputs that of each micro-batch.

    One accumulator a layer, shaped as its weight, is all the memory that it takes.
    """

    def __init__(self, evaluator: Evaluator, item: Item, sizes: Sequence[int]) -> None:
        self._evaluator, self._item, self._sizes = evaluator, item, sizes
        self._squares = zeros_for({name: evaluator.layers[name].weight for name in item["weights"]})
        self._inputs = _zeros(item["inputs"], len(sizes), "a")

    def weight(self, at: int, name: str, gradient: Tensor, scale: float) -> None:
        share = self._sizes[at] / sum(self._sizes)
        self._squares[name].addcmul_(gradient, gradient, value=share / scale**2)

    def input(self, at: int, name: str, width: str, products: Tensor) -> None:
        self._inputs[name][width][at] += float(products.square().sum()) / 2

    def result(self) -> Result:
        weights = _zeros(self._item["weights"], 1)
        for name, squares in self._squares.items():
            for text, found in weights[name].items():
                change = self._evaluator.rounding(name, Scheme.parse(text)).flatten()
                found[0] = float(torch.dot(squares.flatten(), change.square_())) / 2
        return {"weights": weights, "inputs": self._inputs}


class _GaussNewton:
    """⟨G, Δ⟩ of each sample: their squares and products are on average Δ's quadratic form.

    Gradients of as many samples as fit in `LARGE` bytes wait for one rounding of their weight; those of a large model
    do not wait.
    """

    def __init__(self, evaluator: Evaluator, item: Item, sizes: Sequence[int]) -> None:
        self._evaluator = evaluator
        self._weights = _zeros(item["weights"], len(sizes))
        self._inputs = _zeros(item["inputs"], len(sizes), "a")
        self._waiting: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in item["weights"]}
        floats = sum(evaluator.layers[name].weight.numel() for name in item["weights"])
        self._most = max(1, LARGE // max(4 * floats, 1))

    def weight(self, at: int, name: str, gradient: Tensor, scale: float) -> None:
        self._waiting[name].append((at, gradient.flatten() / scale if scale != 1 else gradient.flatten()))
        if len(self._waiting[name]) >= self._most:
            self._multiply(name)

    def input(self, at: int, name: str, width: str, products: Tensor) -> None:
        self._inputs[name][width][at] += float(products.sum())

    def result(self) -> Result:
        for name in self._waiting:
            self._multiply(name)
        return {"weights": _rounded(self._weights), "inputs": _rounded(self._inputs)}

    def _multiply(self, name: str) -> None:
        waiting, self._waiting[name] = self._waiting[name], []
        if waiting:
            for text, found in self._weights[name].items():
                change = self._evaluator.rounding(name, Scheme.parse(text)).flatten()
                for at, gradient in waiting:
                    found[at] = float(torch.dot(gradient, change))


def _zeros(asked: dict[str, list[str]] | dict[str, list[int]], count: int, prefix: str = "") -> Found:
    return {name: {f"{prefix}{key}": [0.0] * count for key in keys} for name, keys in asked.items()}


def _rounded(found: Found) -> Found:
    """To six significant digits: a sketch is kept whole, and its sampling error is far greater."""
    return {
        name: {key: [float(f"{value:.6g}") for value in values] for key, values in keys.items()}
        for name, keys in found.items()
    }


SCORES: dict[str, type[_Score]] = {"fisher": _Fisher, "gauss_newton": _GaussNewton}
"""What may be made of the pass, by metric."""

SAMPLED = Task("sampled", 2, _sampled)
"""Item: the `scores` wanted, samples `start` to `stop` of the calibration split, how many `at_once` for each score, a
seed, and for each layer the `weights` schemes and widths of `inputs` to round to. Result, by score: `sizes` of the
micro-batches, of each layer's weight `squares` (‖G‖² of each micro-batch, under "norm"), `weights` and `inputs`."""
