"""Squared rounding error of the weights: ‖Q(W) − W‖², summed over a unit's weights.

It takes every weight for equally important and sees no activations: what a metric must beat to be worth its passes.
"""

from __future__ import annotations

from search.scheme import Scheme
from workers.sensitivity.rounding import rounding_errors, weight_only
from workers.sensitivity.table import Entry, Subject, Table, metric, sum_of_layers
from workers.tasks import Compute


@metric("weight_mse")
def weight_mse(compute: Compute, subject: Subject) -> Table:
    """The squared error of every unit at every allowed scheme, in squared units of the weights."""
    space = subject.space
    errors = rounding_errors(compute, space)

    def entry(layer: str, scheme: Scheme) -> Entry:
        return Entry(errors[layer][weight_only(scheme)] if scheme.quantizes_weights else 0.0)

    rounds = any(scheme.quantizes_activations for scheme in space.schemes)
    notes = ["rounded activations are not seen: schemes that round them count as those that do not"] if rounds else []
    return Table.of(space, sum_of_layers(entry), notes=notes)
