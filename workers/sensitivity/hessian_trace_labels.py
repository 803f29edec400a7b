"""Hessian trace of the loss on labels, as HAWQ-V2 publishes it (Dong et al., 1911.03852, eq. 4 and §3.2).

The table is filled as in `hessian_trace`, with the Hessian of the labelled loss: next tokens, or classes. That loss has
a gradient, and its Hessian adds to the Gauss-Newton matrix a term in which the gradient stands; it may be indefinite. A
layer with a negative trace has no meaning as a sensitivity: like one that is lost in noise, it counts as its standard
error.

The gradient is differentiated a second time, backwards (`hutchinson.twice_backwards`).
"""

from __future__ import annotations

from workers.evaluator import Evaluator
from workers.loss import labelled_loss
from workers.sensitivity.hessian_trace import trace_table
from workers.sensitivity.hutchinson import Piece, probed, twice_backwards
from workers.sensitivity.table import Subject, Table, metric
from workers.tasks import Compute, Item, Result, Task

ROUNDS = ((0, 1), (2, 3))
"""The seeds of the probes of each round: two probes share a gradient's graph."""


@metric("hessian_trace_labels")
def hessian_trace_labels(compute: Compute, subject: Subject) -> Table:
    """Predicted loss increase of every unit at every allowed scheme; each round probes every calibration sample."""
    return trace_table(compute, subject, PROBE, ROUNDS)


def _run(evaluator: Evaluator, item: Item) -> Result:
    return probed(evaluator, item, _probe)


def _probe(piece: Piece) -> None:
    task = piece.evaluator.loaded.task
    twice_backwards(piece, lambda output: labelled_loss(task, output, piece.batch).mean())


PROBE = Task("hessian_trace_labels.probe", 2, _run)
"""Item: samples of a batch, seeds, layers, layers whose inputs are rounded, to how many bits. Result: as `probed`."""
