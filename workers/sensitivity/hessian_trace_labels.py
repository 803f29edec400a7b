"""Hessian trace of the loss on labels, as HAWQ-V2 publishes it (Dong et al., 1911.03852, eq. 4 and §3.2).

The table is filled as in `hessian_trace`, with the Hessian of the labelled loss: next tokens, or classes. That loss has
a gradient, and its Hessian adds to the Gauss-Newton matrix a term in which the gradient stands; it may be indefinite. A
layer with a negative trace has no meaning as a sensitivity: like one that is lost in noise, it counts as its standard
error.

The gradient is differentiated a second time, backwards: H v = ∂(gᵀv)/∂W. Its graph is built once for the samples that
are probed together and kept for all their probes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.evaluator import Evaluator
from workers.loss import labelled_loss
from workers.sensitivity.hessian_trace import trace_table
from workers.sensitivity.hutchinson import Piece, Place, entering, plain_operations, probed, run_with
from workers.sensitivity.table import Subject, Table, metric
from workers.tasks import Compute, Item, Result, Task

ROUNDS = ((0, 1), (2, 3))
"""The seeds of the probes of each round: two probes share a gradient's graph."""


@metric("hessian_trace_labels")
def hessian_trace_labels(compute: Compute, subject: Subject) -> Table:
    """Predicted loss increase of every unit at every allowed scheme; each round probes every calibration sample."""
    return trace_table(compute, subject, PROBE, ROUNDS)


def _probe(piece: Piece) -> None:
    evaluator, batch, seeds = piece.evaluator, piece.batch, piece.item["seeds"]
    places: dict[Place, Tensor] = {}

    def watch(place: Place, x: Tensor) -> Tensor:
        piece.note_rounding(place, x)
        places[place] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return places[place]

    with torch.enable_grad(), plain_operations(evaluator.loaded.model):
        weights = {name: weight.requires_grad_() for name, weight in piece.weights().items()}
        with entering(evaluator, piece.item["inputs"], watch):
            output = run_with(evaluator, weights, batch)
        loss = labelled_loss(evaluator.loaded.task, output, batch).mean()
        places |= {(name, None): weight for name, weight in weights.items()}
        variables = list(places.values())
        gradients = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
        # A gradient in which no variable stands has no second derivative.
        curved = {place: one for place, one in zip(places, gradients, strict=True) if one.requires_grad}
        for seed in seeds if curved else ():
            piece.seed = seed
            products = torch.autograd.grad(
                list(curved.values()),
                variables,
                [piece.signs(place, gradient) for place, gradient in curved.items()],
                retain_graph=seed != seeds[-1],
                materialize_grads=True,
            )
            for place, product in zip(places, products, strict=True):
                piece.add(place, product)


def _run(evaluator: Evaluator, item: Item) -> Result:
    return probed(evaluator, item, _probe)


PROBE = Task("hessian_trace_labels.probe", 1, _run)
"""Item: samples of a batch, seeds, layers, layers whose inputs are rounded, to how many bits. Result: as `probed`."""
