"""Post-quantization integral (PQI, Hu et al., 2503.01901, eq. 6): the loss change along the path from W to Q(W).

    F(Q(W)) − F(W) = Σ_l share_l        share_l = ∫₀¹ ⟨∂F/∂W_l at W + tΔ, Δ_l⟩ dt,  Δ = Q(W) − W

F is the mean divergence from the full-precision model. On the joint path, where all units that may take a scheme move
to it together, the shares add up to the measured change (completeness; Aumann–Shapley values), interactions included: a
unit that makes up for another's error has a negative share. A rounded input x moves alike, x + t·(Q(x) − x), with its
share ⟨∂F/∂x, Q(x) − x⟩; gradients pass it straight through, so that completeness is then approximate.

`pqi_absolute` takes the absolute value of every element's integral before summing: of a weight's elements, and of an
input's features (summed over samples and positions). It is taken within each shard of the data and averaged over
shards: an upper bound on that of all samples at once, which exceeds it by the sampling noise of the elements. It ranks
units; its sum is no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray
from torch import Tensor

from search.scheme import FULL_PRECISION, Scheme
from search.space import Space, Unit
from workers.calibration import Batch
from workers.evaluator import Evaluator, token_dims
from workers.loss import gradient
from workers.sensitivity.accumulators import zeros_for
from workers.sensitivity.backward import micro_batches_of_split
from workers.sensitivity.path import Path
from workers.sensitivity.table import Entry, Subject, Table, metric
from workers.tasks import Compute, Item, Result, Task

Array = NDArray[np.float64]

RULE = "gauss_legendre"
NODES = (4, 8, 16)
"""Nodes of the rule; more are taken for a scheme while its gap is above tolerance."""

NODES_ALONE = (2, *NODES)
"""Of a unit that moves alone: its loss is nearly quadratic."""

TOLERANCE = 0.05
"""The gap |Σ shares − measured| that is accepted, as a fraction of the measured change. So is a third of its standard
error, to which such a gap adds a twentieth."""

SHARDS = 4
PIECES = 8
"""The calibration samples are cut into so many pieces, the spread of whose shares gives standard errors, and the pieces
dealt to so many shards, each an item."""


@metric("pqi")
def pqi(compute: Compute, subject: Subject) -> Table:
    """Signed shares of every unit in the change of the loss on the joint path of each scheme."""
    return _joint_table(compute, subject, signed=True)


@metric("pqi_absolute")
def pqi_absolute(compute: Compute, subject: Subject) -> Table:
    """Sums of the elements' absolute shares; the same items as those of `pqi`."""
    return _joint_table(compute, subject, signed=False)


@metric("pqi_single")
def pqi_single(compute: Compute, subject: Subject) -> Table:
    """The share of every unit on a path on which it moves alone: the divergence that `kl` measures."""
    space = subject.space
    choices = [
        (unit, scheme)
        for row, unit in enumerate(space.units)
        for scheme, allowed in zip(space.schemes, space.allowed[row], strict=True)
        if allowed and scheme != FULL_PRECISION
    ]
    paths = [_Way(tuple(layer.name for layer in unit.layers), scheme) for unit, scheme in choices]
    integrals = _integrate(compute, paths, sum(subject.batch_sizes), shards=1, nodes=NODES_ALONE)
    found = {(unit.name, scheme): one for (unit, scheme), one in zip(choices, integrals, strict=True)}
    completeness: dict[str, dict[str, Any]] = {unit.name: {} for unit in space.units}
    for (name, scheme), integral in found.items():
        completeness[name][str(scheme)] = integral.completeness()
    apart = sum(not integral.is_complete for integral in integrals)
    return Table.of(
        space,
        _entries(lambda unit, scheme: found[unit.name, scheme].signed(unit)),
        {"completeness": completeness},
        [f"{apart} of {len(integrals)} shares are further from the measured change than accepted"] if apart else [],
    )


def midpoint(n: int) -> tuple[Array, Array]:
    """Nodes on [0, 1] and weights of the midpoint rule; exact on polynomials of degree 1."""
    return (np.arange(n) + 0.5) / n, np.full(n, 1 / n)


def gauss_legendre(n: int) -> tuple[Array, Array]:
    """Nodes on [0, 1] and weights of Gauss–Legendre quadrature; exact on polynomials of degree 2n − 1."""
    x, weights = legendre.leggauss(n)
    return (x + 1) / 2, weights / 2


def gauss_radau(n: int) -> tuple[Array, Array]:
    """The n nodes above 0, and their weights, of the Gauss–Radau quadrature on [0, 1] that has 0 as one more node.

    Exact on polynomials of degree 2n that are 0 at 0, as the derivative of a divergence is at full precision: that node
    costs nothing.
    """
    x = legendre.legroots(legendre.legdiv([0.0] * n + [1.0, 1.0], [1.0, 1.0])[0])
    weights = (1 - x) / ((n + 1) * legendre.legval(x, [0.0] * n + [1.0])) ** 2
    return (x + 1) / 2, weights / 2


RULES = {rule.__name__: rule for rule in (midpoint, gauss_legendre, gauss_radau)}


@dataclass(frozen=True, slots=True)
class _Way:
    """A path: which layers move, and to which scheme."""

    layers: tuple[str, ...]
    scheme: Scheme

    def item(self, samples: list[tuple[int, int]], nodes: int) -> Item:
        return {
            "layers": list(self.layers),
            "scheme": str(self.scheme),
            "rule": RULE,
            "nodes": nodes,
            "samples": [list(piece) for piece in samples],
        }


@dataclass(frozen=True, slots=True)
class _Integral:
    """What the items of one path found together.

    `losses` are those of the samples at the scheme. `weight` and `activation` are the shares on each piece of the data,
    pieces × layers, `absolute_weight` and `absolute_activation` those on each shard, shards × layers; `pieces` and
    `shards` say of how many samples.
    """

    layers: dict[str, int]
    nodes: int
    losses: Array
    pieces: Array
    shards: Array
    weight: Array
    activation: Array
    absolute_weight: Array
    absolute_activation: Array

    @classmethod
    def of(cls, way: _Way, items: Sequence[Item], results: Sequence[Result]) -> _Integral:
        return cls(
            {name: column for column, name in enumerate(way.layers)},
            items[0]["nodes"],
            np.concatenate([result["losses"] for result in results]),
            np.array([stop - start for item in items for start, stop in item["samples"]], dtype=float),
            np.array([sum(stop - start for start, stop in item["samples"]) for item in items], dtype=float),
            np.concatenate([result["weight"] for result in results]),
            np.concatenate([result["activation"] for result in results]),
            np.array([result["absolute_weight"] for result in results]),
            np.array([result["absolute_activation"] for result in results]),
        )

    @property
    def measured(self) -> float:
        return float(self.losses.mean())

    @property
    def total(self) -> float:
        """Σ shares."""
        return float(np.average((self.weight + self.activation).sum(axis=1), weights=self.pieces))

    @property
    def accepted(self) -> float:
        error = self.losses.std(ddof=1) / np.sqrt(len(self.losses)) if len(self.losses) > 1 else 0.0
        return max(TOLERANCE * self.measured, float(error) / 3)

    @property
    def is_complete(self) -> bool:
        return abs(self.total - self.measured) <= self.accepted

    def is_settled(self, before: _Integral | None) -> bool:
        """Whether more nodes would tell nothing: the shares add up, or twice the nodes have not moved their sum.

        The latter happens on a path of rounded inputs, whose gap is no error of the rule.
        """
        return self.is_complete or (before is not None and abs(self.total - before.total) <= self.accepted)

    def completeness(self) -> dict[str, Any]:
        return {
            "measured": self.measured,
            "shares": self.total,
            "gap": abs(self.total - self.measured) / max(self.measured, 1e-300),
            "nodes": self.nodes,
            "rule": RULE,
        }

    def signed(self, unit: Unit) -> Entry:
        return self._entry(unit, self.weight, self.activation, self.pieces)

    def absolute(self, unit: Unit) -> Entry:
        return self._entry(unit, self.absolute_weight, self.absolute_activation, self.shards)

    def _entry(self, unit: Unit, weights: Array, activations: Array, sizes: Array) -> Entry:
        columns = [self.layers[layer.name] for layer in unit.layers]
        weight, activation = weights[:, columns].sum(axis=1), activations[:, columns].sum(axis=1)
        mean_weight, mean_activation = (float(np.average(part, weights=sizes)) for part in (weight, activation))
        return Entry(mean_weight, mean_activation, jackknife(weight + activation, sizes))


def jackknife(means: Array, sizes: Array) -> float:
    """Variance of the mean over all samples, from the means of groups of `sizes` samples; 0 for a single group."""
    groups = len(means)
    if groups < 2:
        return 0.0
    without = ((means * sizes).sum() - means * sizes) / (sizes.sum() - sizes)
    return float((groups - 1) / groups * np.square(without - without.mean()).sum())


def _joint_table(compute: Compute, subject: Subject, *, signed: bool) -> Table:
    space = subject.space
    ways = _joint_ways(space)
    integrals = dict(
        zip(
            ways,
            _integrate(compute, list(ways.values()), sum(subject.batch_sizes), shards=SHARDS, nodes=NODES),
            strict=True,
        )
    )
    signs = Table.of(space, _entries(lambda unit, scheme: integrals[scheme].signed(unit)))
    absolutes = Table.of(space, _entries(lambda unit, scheme: integrals[scheme].absolute(unit)))
    chosen = signs if signed else absolutes
    details = {
        "completeness": {str(scheme): integral.completeness() for scheme, integral in integrals.items()},
        "signed": _by_unit(signs, integrals),
        "absolute": _by_unit(absolutes, integrals),
    }
    notes = [
        f"{scheme}: the units' shares add up to {integral.total:.3g}, the measured change is {integral.measured:.3g}"
        for scheme, integral in integrals.items()
        if not integral.is_complete
    ]
    return Table(chosen.weight, chosen.activation, chosen.stderr, details, tuple(notes))


def _joint_ways(space: Space) -> dict[Scheme, _Way]:
    """For each scheme, the layers of all units that may take it."""
    return {
        scheme: _Way(tuple(layer.name for unit in movers for layer in unit.layers), scheme)
        for column, scheme in enumerate(space.schemes)
        if scheme != FULL_PRECISION
        and (movers := [unit for row, unit in enumerate(space.units) if space.allowed[row, column]])
    }


def _entries(entry: Callable[[Unit, Scheme], Entry]) -> Callable[[Unit, Scheme], Entry]:
    return lambda unit, scheme: Entry(0.0) if scheme == FULL_PRECISION else entry(unit, scheme)


def _by_unit(table: Table, schemes: Iterable[Scheme]) -> dict[str, dict[str, float]]:
    """Scheme → unit → value, of what is allowed."""
    columns = {str(scheme): table.values[str(scheme)] for scheme in schemes}
    return {text: column[np.isfinite(column)].to_dict() for text, column in columns.items()}


def _integrate(
    compute: Compute, ways: Sequence[_Way], samples: int, *, shards: int, nodes: tuple[int, ...]
) -> list[_Integral]:
    """The integral of each path, with as many of the `nodes` as it takes to be settled."""
    found: dict[_Way, _Integral] = {}
    open_ = list(ways)
    for n in nodes:
        items = [[way.item(shard, n) for shard in _shards(samples, shards)] for way in open_]
        results = iter(compute(PATH, [item for group in items for item in group]))
        again = []
        for way, group in zip(open_, items, strict=True):
            integral = _Integral.of(way, group, [next(results) for _ in group])
            if not integral.is_settled(found.get(way)):
                again.append(way)
            found[way] = integral
        if not (open_ := again):
            break
    return [found[way] for way in ways]


def _shards(samples: int, shards: int) -> list[list[tuple[int, int]]]:
    """`samples` cut into pieces [start, stop), dealt to `shards` in order; fewer of both where samples are few."""
    cuts = np.linspace(0, samples, min(PIECES, samples) + 1).round().astype(int).tolist()
    pieces = list(pairwise(cuts))
    bounds = np.linspace(0, len(pieces), min(shards, len(pieces)) + 1).round().astype(int).tolist()
    return [pieces[low:high] for low, high in pairwise(bounds)]


def _path(evaluator: Evaluator, item: Item) -> Result:
    walk = _Walk(evaluator, item)
    losses = walk.far_end()
    sums, shares = torch.zeros(()), []
    for start, stop in item["samples"]:
        walk.integrate(start, stop)
        # What the piece adds to the sums over samples, for each of its samples.
        before, sums = sums, walk.sums()
        shares.append((sums - before) / (stop - start))
    weight, activation = torch.stack(shares, dim=1).tolist()
    absolute_weight, absolute_activation = (walk.sums(torch.abs) / len(losses)).tolist()
    return {
        "losses": losses,
        "weight": weight,
        "activation": activation,
        "absolute_weight": absolute_weight,
        "absolute_activation": absolute_activation,
    }


def _outliers(evaluator: Evaluator, item: Item) -> Result:
    walk = _Walk(evaluator, item)
    for start, stop in item["samples"]:
        walk.integrate(start, stop)
    samples = sum(stop - start for start, stop in item["samples"])
    result: Result = {}
    for name in item["layers"]:
        scores = evaluator.layers[name].matrix(walk.elements(name)).flatten().abs_().div_(samples)
        best = scores.topk(min(item.get("count", round(item.get("fraction", 1.0) * len(scores))), len(scores)))
        result[name] = {"indices": best.indices.tolist(), "scores": best.values.tolist()}
    return result


class _Walk:
    """A model walked along the path of an item.

    What it keeps, summed over samples, is the integral of each layer's gradient with respect to its weight, in float32,
    and that of ⟨gradient, Q(x) − x⟩ for each feature of its input: a column of a linear layer, a channel of a
    convolution.
    """

    def __init__(self, evaluator: Evaluator, item: Item) -> None:
        evaluator.apply({})
        self._evaluator = evaluator
        self._item = item
        self._path = Path(evaluator, item["layers"], Scheme.parse(item["scheme"]))
        weights = {name: evaluator.layers[name].weight for name in item["layers"]}
        self._gradients = zeros_for(weights)
        self._features = {name: torch.zeros(1, device=weight.device) for name, weight in weights.items()}
        self._width = 0.0

    @torch.no_grad()
    def far_end(self) -> list[float]:
        """The loss of every sample at the scheme."""
        # Best done first: a loss takes more memory than its gradient.
        self._path.t = 1.0
        losses: list[float] = []
        for start, stop in self._item["samples"]:
            for batch, reference in _parts(self._evaluator, start, stop):
                with self._path.walked(self._add_weight, self._add_input):
                    output = self._evaluator.loaded(batch)
                losses += self._evaluator.losses(batch, output, reference).tolist()
        return losses

    def integrate(self, start: int, stop: int) -> None:
        """Add what samples `start` to `stop` find at all nodes of the rule."""
        evaluator, rule = self._evaluator, RULES[self._item["rule"]]
        for batch, reference in _parts(evaluator, start, stop):
            with _entered(evaluator, self._item["layers"], batch):
                for node, width in zip(*rule(self._item["nodes"]), strict=True):
                    self._path.t, self._width = float(node), float(width)
                    with self._path.walked(self._add_weight, self._add_input):
                        output = evaluator.loaded(batch)
                        if output.requires_grad:
                            _Divergence.apply(output, reference, evaluator, batch).backward()  # type: ignore[no-untyped-call]

    def elements(self, name: str) -> Tensor:
        """The integral of each of a layer's weights, shaped as the parameter."""
        return self._evaluator.rounding(name, self._path.scheme).mul_(self._gradients[name])

    def sums(self, of: Callable[[Tensor], Tensor] = torch.positive) -> Tensor:
        """Of the elements of each layer's weight, and of its input's features: 2 × layers."""
        layers = self._item["layers"]
        weight = [float(of(self.elements(name)).sum(-1).double().sum()) for name in layers]
        return torch.tensor([weight, [float(of(self._features[name]).sum()) for name in layers]], dtype=torch.float64)

    def _add_weight(self, name: str, slope: Tensor) -> None:
        self._gradients[name].add_(slope, alpha=self._width)

    def _add_input(self, name: str, slope: Tensor, change: Tensor) -> None:
        at = 1 if token_dims(self._evaluator.layers[name].module, slope) > 1 else -1
        share = (slope * change).double().movedim(at, -1).flatten(0, -2).sum(0)
        self._features[name] = self._features[name] + share * self._width


class _Divergence(torch.autograd.Function):
    """Starts a backward pass with the gradient of the samples' summed divergence, and holds nothing once it runs."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, reference: Tensor, evaluator: Evaluator, batch: Batch) -> Tensor:
        ctx.save_for_backward(output)
        ctx.rest = (reference, batch.get("attention_mask"))
        ctx.task = evaluator.loaded.task
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient(ctx.task, *ctx.saved_tensors, *ctx.rest), None, None, None


def _parts(evaluator: Evaluator, start: int, stop: int) -> Iterator[tuple[Batch, Tensor]]:
    """Samples `start` to `stop` of the calibration split with their full-precision output."""
    for batch, index, chosen in micro_batches_of_split(evaluator, start, stop):
        yield batch, evaluator.reference("calibration", index)[chosen].clone()


def _entered(evaluator: Evaluator, layers: list[str], batch: Batch) -> AbstractContextManager[None]:
    """Within, blocks before the first one that moves do no work."""
    chain = evaluator.chain
    blocks = {evaluator.layers[name].layer.block for name in layers}
    if chain is None or None in blocks:
        return nullcontext()
    start = min(chain.names.index(block) for block in blocks if block)
    if start == 0:
        return nullcontext()
    with torch.no_grad():
        return chain.resumed(start, chain.output_of(start - 1, lambda: evaluator.loaded(batch)))


PATH = Task("pqi.path", 2, _path)
"""Item: the layers that move, their scheme, a rule of `RULES` with its number of nodes, and pieces of the calibration
samples. Result: the loss of each sample at the scheme, the layers' shares ("weight", "activation": pieces × layers) and
their sums of absolute values on all these samples."""

OUTLIERS = Task("pqi.outliers", 1, _outliers)
"""Item: as of `PATH`, and a `count` of elements or a `fraction` of each layer. Result: layer → `indices` (into the rows
× columns weight, flat) and `scores` of the elements with the greatest |integral|, greatest first."""
