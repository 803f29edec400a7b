"""Hessian trace (HAWQ-V2, Dong et al., 1911.03852): average trace × squared perturbation, by Hutchinson's estimator.

For layer l with n_l weights and Hessian H_l of the loss,

    ΔL_l(s) ≈ ½ · (Tr(H_l) / n_l) · ‖Q_s(W_l) − W_l‖²        Tr(H_l) = E[v_lᵀ (H v)_l],  v Rademacher

(HAWQ-V2, eq. 4, leaves out Taylor's ½). The loss is the divergence from the model's own output: its gradient is zero at
full precision, so its Hessian is exactly the Gauss-Newton matrix JᵀCJ, positive semidefinite. Activations are treated
alike, with the trace with respect to the layer's input and the rounding error of that input.

J v is taken forwards, which keeps no graph, and Jᵀ backwards: half the memory of differentiating twice backwards, and
less work. The probes of an item share the graph of the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from search.cost import stored_bits
from search.scheme import Scheme
from search.space import Space
from search.stability import STABLE, changed_decisions
from workers.evaluator import Evaluator
from workers.loss import curvature
from workers.sensitivity.backward import visiting
from workers.sensitivity.hutchinson import (
    Piece,
    Place,
    entering,
    plain_operations,
    probed,
    run_with,
    twice_backwards,
)
from workers.sensitivity.rounding import rounding_errors, weight_only
from workers.sensitivity.table import Entry, Subject, Table, metric, sum_of_layers, variance_of_mean
from workers.tasks import Compute, Item, Result, Task

PARTS = 4
"""Each calibration batch is probed in so many parts, each with its own probe: for the same work, independent probes on
few samples tell more than one probe on many."""

ROUNDS = ((0,), (1,), (2, 3))
"""The seeds of the probes of each round, of every part: what is known doubles with each round."""

RELATIVE_ERROR = 0.2
"""Rounds stop when the mean relative error that the probes leave in the layers' traces is below this."""


@metric("hessian_trace")
def hessian_trace(compute: Compute, subject: Subject) -> Table:
    """Predicted loss increase of every unit at every allowed scheme; each round probes every calibration sample."""
    return trace_table(compute, subject, PROBE, ROUNDS)


def trace_table(compute: Compute, subject: Subject, task: Task, rounds: Sequence[Sequence[int]]) -> Table:
    """The table of the average traces that `task` probes, once with each of the seeds of a round.

    Rounds go on until another would not change what is chosen, or there is none. The table's standard errors are those
    between parts, of samples and probes together; whether to go on is decided by what other probes could change.
    """
    space = subject.space
    rounding = rounding_errors(compute, space)
    names, inputs = [layer.name for layer in space.layers], _layers_with_rounded_inputs(space)
    widths = sorted({scheme.activation_bits for scheme in space.schemes if scheme.quantizes_activations})
    parts = _parts(subject.batch_sizes)
    found: list[list[Result]] = [[] for _ in parts]

    def table(estimates: dict[str, Estimate], probes_only: bool = False) -> Table:
        weight = estimates["weight"].by_layer(names, probes_only)
        activation = {width: estimates[f"a{width}"].by_layer(inputs, probes_only) for width in widths}

        def entry(layer: str, scheme: Scheme) -> Entry:
            of_weight = of_activation = variance = 0.0
            if scheme.quantizes_weights:
                mean, error = weight[layer]
                half_square = rounding[layer][weight_only(scheme)] / 2
                of_weight, variance = mean * half_square, (error * half_square) ** 2
            if scheme.quantizes_activations:
                of_activation, error = activation[scheme.activation_bits][layer]
                variance += error**2
            return Entry(of_weight, of_activation, variance)

        return Table.of(space, sum_of_layers(entry))

    for seeds in rounds:
        asked = {"seeds": list(seeds), "layers": names, "inputs": inputs, "activation_bits": widths}
        for known, result in zip(found, compute(task, [part | asked for part in parts]), strict=True):
            known.append(result)
        estimates = _estimates(found, [part["samples"] for part in parts])
        relative_error = max(estimate.relative_error() for estimate in estimates.values())
        changed = _changed_decisions(space, table(estimates, probes_only=True))
        probes = sum(map(len, rounds[: len(found[0])]))
        if probes * len(parts) == 1:
            continue
        if relative_error < RELATIVE_ERROR:
            stopped = "relative error"
            break
        if changed <= STABLE:
            stopped = "stable decisions"
            break
    else:
        stopped = "most probes"

    details = {
        **estimates["weight"].details("average_trace", names),
        **estimates["input"].details("input_average_trace", inputs),
        "relative_error": relative_error,
        "changed_decisions": changed,
        "probes_per_sample": probes,
        "stopped": stopped,
    }
    notes = list(estimates["weight"].notes())
    if stopped == "most probes":
        notes.append(
            f"stopped at the most probes: they leave a mean relative error of {relative_error:.0%} in the layers' "
            f"traces, which changes up to {changed:.0%} of the decisions"
        )
    final = table(estimates)
    return Table(final.weight, final.activation, final.stderr, details, tuple(notes))


class Estimate(NamedTuple):
    """Of every layer: the mean, its standard error, and what of that error the probes leave."""

    mean: NDArray[np.float64]
    error: NDArray[np.float64]
    probe_error: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[np.float64], weights: NDArray[np.float64]) -> Estimate:
        """From independent parts × probes × layers; `weights` are those of the parts and add up to 1.

        Probes of one part see the same samples: the error is that between parts; of a single part, that between probes.
        """
        parts, probes, _ = values.shape
        by_part = values.mean(axis=1)
        mean = weights @ by_part
        between = variance_of_mean(by_part, weights) if parts > 1 else None
        if probes == 1:
            # Nothing tells samples from probes: other probes change no more than all there is.
            within = np.zeros_like(mean) if between is None else between
        else:
            within = (weights**2) @ values.var(axis=1, ddof=1) / probes
        return cls(mean, np.sqrt(within if between is None else between), np.sqrt(within))

    def by_layer(self, names: list[str], probes_only: bool = False) -> dict[str, tuple[float, float]]:
        """Mean and standard error by layer; a mean that is lost in noise, or below, counts as that noise."""
        errors = self.probe_error if probes_only else self.error
        floored = np.maximum(self.mean, self.error)
        return {name: (float(m), float(e)) for name, m, e in zip(names, floored, errors, strict=True)}

    def relative_error(self) -> float:
        """The mean over layers of what the probes leave, at most 1 for each."""
        if not self.mean.size:
            return 0.0
        return float((self.probe_error / np.maximum(np.abs(self.mean), 1e-300)).clip(0, 1).mean())

    def details(self, name: str, layers: list[str]) -> dict[str, dict[str, float]]:
        """`name` and its standard error, by layer."""
        return {
            name: dict(zip(layers, self.mean.tolist(), strict=True)),
            f"{name}_stderr": dict(zip(layers, self.error.tolist(), strict=True)),
        }

    def notes(self) -> tuple[str, ...]:
        """Count the layers with a negative trace."""
        negative, layers = int((self.mean < 0).sum()), len(self.mean)
        if not negative:
            return ()
        return (f"{negative} of {layers} layers have a negative average trace, which counts as its standard error",)


def _estimates(found: list[list[Result]], samples: list[int]) -> dict[str, Estimate]:
    weights = np.array(samples) / sum(samples)
    return {
        part: Estimate.of(np.array([[probe for one in known for probe in one[part]] for known in found]), weights)
        for part in found[0][0]
    }


def _parts(batch_sizes: Sequence[int]) -> list[Item]:
    """Where each batch is cut, with the samples of each part."""
    sizes = {size: -(-size // PARTS) for size in batch_sizes}
    return [
        {"batch": batch, "start": start, "samples": min(sizes[size], size - start)}
        for batch, size in enumerate(batch_sizes)
        for start in range(0, size, sizes[size])
    ]


def _changed_decisions(space: Space, table: Table) -> float:
    values, errors = table.values.to_numpy(), table.stderr.to_numpy()
    relative = np.divide(errors, values, out=np.zeros_like(values), where=np.isfinite(values) & (values > 0))
    return changed_decisions(values, relative.max(axis=1), stored_bits(space))


def _layers_with_rounded_inputs(space: Space) -> list[str]:
    rounds = np.array([scheme.quantizes_activations for scheme in space.schemes])
    rows = (space.allowed & rounds).any(axis=1)
    return [layer.name for unit, row in zip(space.units, rows, strict=True) if row for layer in unit.layers]


def _probe(piece: Piece) -> None:
    evaluator, seeds = piece.evaluator, piece.item["seeds"]
    try:
        cotangents = [_curved(piece, seed) for seed in seeds]
    except NotImplementedError:
        # An operation has no forward derivative. As the divergence has no gradient, the result is the same.
        return twice_backwards(piece, partial(_mean_divergence, piece))

    def watch(place: Place, x: Tensor) -> Tensor:
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        x.register_hook(lambda gradient: piece.add(place, gradient))  # type: ignore[no-untyped-call]
        return x

    with (
        torch.enable_grad(),
        visiting(evaluator, piece.layers, weight=lambda name, gradient: piece.add((name, None), gradient)),
        entering(evaluator, piece.item["inputs"], watch),
    ):
        output = evaluator.loaded(piece.batch)
        if not output.requires_grad:
            return None
        for seed, cotangent in zip(seeds, cotangents, strict=True):
            piece.seed = seed
            torch.autograd.backward(output, cotangent, retain_graph=seed != seeds[-1])
    return None


def _mean_divergence(piece: Piece, output: Tensor) -> Tensor:
    return piece.evaluator.losses(piece.batch, output, output.detach()).mean()


@torch.no_grad()
def _curved(piece: Piece, seed: int) -> Tensor:
    """C·J·v: the change of the output along a probe, times the curvature of the mean loss there."""
    evaluator, piece.seed = piece.evaluator, seed

    def move(place: Place, x: Tensor) -> Tensor:
        x, tangent = _value_and_tangent(x)
        piece.note_rounding(place, x)
        signs = piece.signs(place, x)
        return _moving(x, signs if tangent is None else tangent + signs)

    with forward_ad.dual_level(), plain_operations(evaluator.loaded.model):
        weights = {name: _moving(weight, piece.signs((name, None), weight)) for name, weight in piece.weights().items()}
        with entering(evaluator, piece.item["inputs"], move):
            output, change = _value_and_tangent(run_with(evaluator, weights, piece.batch))
    if change is None:
        return torch.zeros_like(output)
    mask = piece.batch.get("attention_mask")
    return (curvature(evaluator.loaded.task, output, change, mask) / piece.samples).to(output)


def _moving(x: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(x, tangent)  # type: ignore[no-untyped-call]
    return dual


def _value_and_tangent(x: Tensor) -> tuple[Tensor, Tensor | None]:
    value, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return value, tangent


def _run(evaluator: Evaluator, item: Item) -> Result:
    return probed(evaluator, item, _probe)


PROBE = Task("hessian_trace.probe", 3, _run)
"""Item: samples of a batch, seeds, layers, layers whose inputs are rounded, to how many bits. Result: as `probed`."""
