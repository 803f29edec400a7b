"""Signed Gauss-Newton sketch: a random number for every unit and scheme whose products are the loss's quadratic form.

With G the score's gradient of one sample (`sampled` describes it) and Δ a change of weights,

    r(u, s) = ⟨G, Δ_(u,s)⟩        ½ E[r²] = ½ ΔᵀHΔ        ½ E[(Σ_u r(u, s_u))²] = loss of the whole allocation

to second order: a unit's own prediction includes all interactions of its weights, and `joint` those between units. A
rounded input x counts with ⟨g_x, Q(x) − x⟩, g_x being its gradient through this layer alone.

Each sample gives one row of the sketch: the relative error of ½ mean r² is about √(2 / samples).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from search.scheme import Scheme
from search.space import Space, Unit
from workers.sensitivity.rounding import weight_only
from workers.sensitivity.sampled import Array, joined, sampled, sum_of
from workers.sensitivity.table import Entry, Subject, Table, metric, variance_of_mean
from workers.tasks import Compute


@metric("gauss_newton")
def gauss_newton(compute: Compute, subject: Subject) -> Table:
    """Predicted loss increase of every unit at every allowed scheme: ½ mean r² of its weights, and of its inputs.

    The standard error is that of the mean over samples, as if each were drawn anew with its label. `details` keeps the
    `sketch`: r as samples × units × schemes, to six digits, null where a scheme is not allowed, `weight` and
    `activation` apart; the latter is null where no scheme rounds inputs.
    """
    space = subject.space
    results = sampled(compute, subject, "gauss_newton")
    weights, inputs = joined(results, "gauss_newton", "weights"), joined(results, "gauss_newton", "inputs")
    samples = sum(subject.batch_sizes)
    rows = np.zeros(samples)

    def weight(unit: Unit, scheme: Scheme) -> Array:
        return rows + sum_of(unit, weights, weight_only(scheme))

    def activation(unit: Unit, scheme: Scheme) -> Array:
        return rows + sum_of(unit, inputs, f"a{scheme.activation_bits}")

    def entry(unit: Unit, scheme: Scheme) -> Entry:
        of_weight, of_activation = (part(unit, scheme) ** 2 / 2 for part in (weight, activation))
        variance = float(variance_of_mean(of_weight + of_activation, rows + 1))
        return Entry(float(of_weight.mean()), float(of_activation.mean()), variance)

    sketch = {"weight": _sketch(space, weight), "activation": _sketch(space, activation) if inputs else None}
    return Table.of(space, entry, {"sketch": sketch})


def joint(table: Table, allocation: Mapping[str, str]) -> tuple[float, float]:
    """Predicted loss of a whole allocation with its standard error: ½ mean (Σ r)², all interactions included.

    `table` is one of `gauss_newton`, or of `from_json`; `allocation` gives units their schemes, both by name; units
    left out keep full precision. An allocation chosen for its prediction fits the sketch's noise: judge it by another.
    Raises ValueError for an unknown unit or scheme, and for a scheme that a unit may not take.
    """
    losses = _rows(table, allocation).sum(axis=1) ** 2 / 2
    return float(losses.mean()), float(variance_of_mean(losses, np.ones(len(losses)))) ** 0.5


def interactions(table: Table, allocation: Mapping[str, str]) -> pd.DataFrame:
    """Units × units (those of `allocation`, by name): ½ mean r_u·r_v, whose sum is the prediction of `joint`.

    Raises what `joint` raises.
    """
    rows = _rows(table, allocation)
    names = pd.Index(allocation, name="unit")
    return pd.DataFrame(rows.T @ rows / (2 * len(rows)), names, names)


def _rows(table: Table, allocation: Mapping[str, str]) -> Array:
    """r of each sample and each unit of the allocation, weights and activations together."""
    units = [list(table.weight.index).index(unit) for unit in allocation]
    schemes = [list(table.weight.columns).index(scheme) for scheme in allocation.values()]
    sketch = table.details["sketch"]
    parts = [np.array(part, dtype=float)[:, units, schemes] for part in sketch.values() if part is not None]
    rows: Array = np.sum(parts, axis=0)
    if np.isnan(rows).any():
        refused = [f"{unit} at {scheme}" for unit, scheme in allocation.items() if np.isinf(table.weight[scheme][unit])]
        raise ValueError(f"not allowed: {', '.join(refused)}")
    return rows


def _sketch(space: Space, part: Callable[[Unit, Scheme], Array]) -> list[list[list[float | None]]]:
    """Samples × units × schemes; None where a scheme is not allowed."""
    by_unit = [
        [part(unit, scheme).tolist() if allowed else None for scheme, allowed in zip(space.schemes, row, strict=True)]
        for unit, row in zip(space.units, space.allowed, strict=True)
    ]
    samples = len(next(filter(None, by_unit[0])))
    return [[[found and found[at] for found in row] for row in by_unit] for at in range(samples)]
