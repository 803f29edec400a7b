"""The sensitivity stage: each metric's table, found in the store or filled, and refused where it is not finite."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from search.errors import UnsupportedModel
from search.metrics import METRICS, Metric
from search.scheme import FULL_PRECISION
from search.space import Space
from workers.profiling import Profile
from workers.run import Run, listed
from workers.sensitivity import FILLS, Subject, Table
from workers.tasks import Item, Result, Task, above_broken_numbers, texts


def fill_tables(run: Run, profile: Profile) -> dict[str, Table]:
    """Each metric fills its table; each finished table is a row, keyed by what it depends on."""
    subject = Subject(profile.space, profile.batch_sizes, frozenset(run.request.sensitivity))
    return {metric: fill_table(run, METRICS[metric], subject, profile) for metric in run.request.sensitivity}


def fill_table(run: Run, metric: Metric, subject: Subject, profile: Profile) -> Table:
    """The table of a metric: the one that another search stored, else computed.

    What an attempt before this one has computed of it is found piece by piece, so that it counts as before. Raises
    UnsupportedModel when a value is not finite.
    """
    passes = metric.forward_passes(profile.space)
    estimate = {"forward_passes": passes, "estimated_seconds": passes * profile.forward_seconds / run.evaluators}
    run.enter("sensitivity", 0, {"metric": metric.name} | estimate)
    key = run.content.table_key(metric, profile.space)
    began = time.monotonic()
    reused = run.is_foreign(key)
    if reused:
        stored = run.find("sensitivity", [key])[key]
    else:
        table = computed_table(run, metric, subject, profile)
        value = {"metric": metric.name} | table.to_json()
        stored = run.keep(key, "sensitivity", value, time.monotonic() - began)
    table = Table.from_json(stored)
    for note in table.notes:
        run.notice(f"{metric.name}: {note}")
    run.summary["tables"][metric.name] = key
    earlier = run.summary["metrics"].get(metric.name, {}).get("seconds", 0.0)
    run.summary["metrics"][metric.name] = estimate | {
        "seconds": max(earlier, time.monotonic() - began),
        "reused": reused,
        "in_loss_units": metric.in_loss_units,
        "notes": list(table.notes),
    }
    run.save()
    return table


def computed_table(run: Run, metric: Metric, subject: Subject, profile: Profile) -> Table:
    """The table of a metric as its parts are computed, or found."""
    steps = 0

    def vet(item: Item, result: Result) -> None:
        check_result(metric, item, result, profile.space)

    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        nonlocal steps
        before, steps = steps, steps + len(items)
        return run.compute(task, items, "sensitivity", vet=vet, part=(before, steps, 1))

    table = FILLS[metric.name](compute, subject)
    check_finite(metric, table, profile.space)
    return with_idle_units_noted(table, profile.space) if "data" in metric.needs else table


def check_finite(metric: Metric, table: Table, space: Space) -> None:
    """Raise UnsupportedModel, naming units, when a prediction that should exist is not finite."""
    broken = ~np.isfinite(table.values.to_numpy()) & space.allowed
    if broken.any():
        names = [unit.name for unit, row in zip(space.units, broken.any(axis=1), strict=True) if row]
        raise _not_finite(metric, f" for {len(names)} of {len(space.units)} units, {names[0]} among them")


def check_result(metric: Metric, item: Item, result: Result, space: Space) -> None:
    """Raise UnsupportedModel, naming units, when a number in a result that a metric asked for is not finite.

    The units are those that stand above such numbers in the result, else those that the item names.
    """
    broken = above_broken_numbers(result)
    if broken:
        names = _units_named(broken, space) or _units_named(texts(item), space)
        raise _not_finite(metric, f" for {listed(names)}" if names else "")


def with_idle_units_noted(table: Table, space: Space) -> Table:
    """The table with a note that names the units for which it predicts no loss, whatever they are rounded to."""
    rounds = space.allowed & np.array([scheme != FULL_PRECISION for scheme in space.schemes])
    idle = rounds.any(axis=1) & ~(rounds & (table.values.to_numpy() != 0)).any(axis=1)
    names = [unit.name for unit, row in zip(space.units, idle, strict=True) if row]
    if not names:
        return table
    them = "it" if len(names) == 1 else "them"
    note = (
        f"no loss is predicted at any scheme for {listed(names)}: "
        f"the loss does not depend on {them}, or rounding hardly changes {them}"
    )
    return replace(table, notes=(*table.notes, note))


def _not_finite(metric: Metric, where: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{metric.name} is not finite{where}: the model's activations or gradients overflow on the calibration data",
        field="sensitivity",
        value=metric.name,
        accepted="a model that is finite on the calibration data, at full precision and at the schemes of the space; "
        "on half precision, BITFRONTIER_DTYPE=float32",
    )


def _units_named(texts: set[str], space: Space) -> list[str]:
    """The units among `texts`, by their own name or by a layer's."""
    return [unit.name for unit in space.units if texts & {unit.name, *(layer.name for layer in unit.layers)}]
