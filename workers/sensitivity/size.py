"""Bytes saved: a control that knows nothing of the loss.

A unit at a scheme is charged the bytes that the scheme saves against 16 bits. Whatever a metric adds to this, it knows
of the model.
"""

from __future__ import annotations

from search.scheme import FULL_PRECISION, Scheme
from search.space import Unit
from workers.sensitivity.table import Entry, Subject, Table, metric
from workers.tasks import Compute


@metric("size")
def size(_compute: Compute, subject: Subject) -> Table:
    """Bytes that every unit saves at every allowed scheme; never below zero."""
    return Table.of(subject.space, _entry)


def _entry(unit: Unit, scheme: Scheme) -> Entry:
    shapes = [(layer.rows, layer.columns) for layer in unit.layers]
    saved = sum(FULL_PRECISION.storage_bits(*shape) - scheme.storage_bits(*shape) for shape in shapes)
    return Entry(max(saved, 0) / 8)
