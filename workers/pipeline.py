"""One search from claim to frontier: profile, sensitivity, baselines, optimize, measure.

Every stage can be done again: what was finished is found by its content.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import Engine

from db import queue
from db.candidates import put_candidates
from db.events import add_event
from db.models import get_model, put_model
from db.results import get_results, put_result
from db.searches import get_search
from db.tables import Stage
from search.agreement import spearman
from search.budget import Bound, check_feasible, cost_bounds
from search.candidate import Candidate
from search.cost import Cost, Resource, cost_tables
from search.errors import InvalidCalibration, UnsupportedModel
from search.ilp import check_jointly_feasible, frontier
from search.inventory import Inventory
from search.measurement import metrics
from search.metrics import METRICS, Metric
from search.proposals import Drafts, axes, judge
from search.request import SearchRequest
from search.scheme import FULL_PRECISION
from search.space import Space, build_space
from search.surrogate import scheme_factors
from search.targets import find_target
from workers.cluster import Pool
from workers.datasets import path_of
from workers.evaluator import EvaluatorSpec
from workers.fingerprint import fingerprint
from workers.models import HUB, dtype
from workers.run import Run
from workers.sensitivity import FILLS, Subject, Table
from workers.tasks import DESCRIBE, MEASURE, Content, Item, Result, Task, above_broken_numbers, texts

NAMED = 5
"""So many units a message names at most."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known before anything is quantized."""

    inventory: Inventory
    space: Space
    costs: dict[Resource, Cost]
    bounds: list[Bound]
    batch_sizes: tuple[int, ...]
    forward_seconds: float


def evaluator_spec(engine: Engine, request: SearchRequest) -> EvaluatorSpec:
    """Where the requested model comes from (a registered source, or the hub), and the data to feed it."""
    model = get_model(engine, request.model)
    if model is None and "/" not in request.model:
        raise UnsupportedModel(
            f"there is no registered model '{request.model}'",
            field="model",
            value=request.model,
            accepted="a registered name (GET /v1/models), or a Hugging Face id such as org/name",
        )
    source = model.source if model else HUB + request.model
    dataset = request.calibration.dataset
    return EvaluatorSpec(
        source=source,
        calibration=request.calibration,
        quantizer=request.space.quantizer,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=dtype(),
        files=fingerprint(Path(source), *filter(None, [path_of(dataset) if dataset else None])),
    )


def run_search(
    engine: Engine, claim: queue.Claim, pool_for: Callable[[EvaluatorSpec], Pool], check: Callable[[], None]
) -> None:
    """Do what is left of a claimed search, and finish it.

    Raises BitfrontierError with the reason when it cannot be done, what `check` raises when it must stop, and
    queue.LeaseLost when the search is no longer ours.
    """
    search = get_search(engine, claim.search_id)
    request = SearchRequest.model_validate(search.request)
    run = Run(engine, claim, request, pool_for(evaluator_spec(engine, request)), check)
    profile = profile_model(run)
    tables = fill_tables(run, profile)
    predictions = {metric: _prediction(table) for metric, table in tables.items()}
    uniform = Drafts(profile.space, profile.costs, predictions).baselines()
    baselines = measure(run, profile, uniform, "baselines")
    candidates = measure(run, profile, optimize(run, profile, tables, baselines), "measure")
    tell_if_nothing_fits(run, candidates)
    run.summary["agreement"] = agreement(candidates)
    queue.succeed(engine, claim, run.summary)


def profile_model(run: Run) -> Profile:
    """Load the model, enumerate layers, tie units, fill the cost tables; refuse what cannot be met."""
    run.enter("profile", 1)
    ((_, described),) = run.pool.map(DESCRIBE.run, [{}])
    inventory = Inventory.from_json(described["inventory"])
    request, spec = run.request, run.pool.spec
    model = get_model(run.engine, request.model)
    if model is None or model.source == spec.source:
        put_model(run.engine, request.model, spec.source, inventory)
    run.content = Content(inventory.digest, described["data_digest"], request.space.quantizer)

    check_labels(request, labelled=described["labelled"])
    space = build_space(inventory, request.space, find_target(request.target))
    costs = cost_tables(space, inventory)
    bounds = cost_bounds(request.budgets.named())
    if loose := described["used_outside"]:
        run.notice(
            f"the model also uses the weights of {_listed(loose)} outside of their layers: kl, pqi, higgs, gradient "
            "and autoscheme do not see that use, and predict too little; measured losses do"
        )
    check_feasible(bounds, costs)
    check_jointly_feasible(costs, bounds)
    run.summary |= {
        "model_digest": inventory.digest,
        "data_digest": described["data_digest"],
        "task": inventory.task,
        "architecture": inventory.architecture,
        "device": _device_name(spec.device),
        "units": [
            {"name": unit.name, "layers": [layer.name for layer in unit.layers], "block": unit.block}
            for unit in space.units
        ],
        "layers": [
            {"name": layer.name, "kind": layer.kind, "block": layer.block}
            | {"rows": layer.rows, "columns": layer.columns, "macs": layer.macs}
            for layer in space.layers
        ],
        "schemes": [str(scheme) for scheme in space.schemes],
        "axes": axes(bounds),
        "feasible": {name: {"min": cost.smallest, "max": cost.largest} for name, cost in costs.items()},
        "full_precision": {
            name: value for name, value in described["full_precision"].items() if not name.startswith("loss")
        },
        "tables": {},
        "metrics": {},
        "correction": {},
    }
    run.save()
    queue.progress(run.engine, run.claim, "profile", 1, 1)
    return Profile(inventory, space, costs, bounds, tuple(described["batch_sizes"]), described["forward_seconds"])


def check_labels(request: SearchRequest, *, labelled: bool) -> None:
    """Raise InvalidCalibration when a requested metric needs labels that the data does not have."""
    needing = [name for name in request.sensitivity if "labels" in METRICS[name].needs]
    if needing and not labelled:
        without = [name for name, metric in METRICS.items() if "labels" not in metric.needs]
        raise InvalidCalibration(
            f"{needing[0]} needs labels, and the calibration data has none",
            field="sensitivity",
            value=needing[0],
            accepted=f"a calibration.dataset with labels, or metrics that need none: {', '.join(without)}",
        )


def fill_tables(run: Run, profile: Profile) -> dict[str, Table]:
    """Each metric fills its table; each finished table is a row, keyed by what it depends on."""
    subject = Subject(profile.space, profile.batch_sizes, frozenset(run.request.sensitivity))
    return {metric: fill_table(run, METRICS[metric], subject, profile) for metric in run.request.sensitivity}


def fill_table(run: Run, metric: Metric, subject: Subject, profile: Profile) -> Table:
    """The table of a metric: the stored one, else computed.

    Raises UnsupportedModel when a value is not finite.
    """
    assert run.content is not None
    passes = metric.forward_passes(profile.space)
    estimate = {"forward_passes": passes, "estimated_seconds": passes * profile.forward_seconds / len(run.pool)}
    run.enter("sensitivity", 0, {"metric": metric.name} | estimate)
    key = run.content.table_key(metric, profile.space)
    began = time.monotonic()
    stored = get_results(run.engine, [key]).get(key)
    if stored is not None:
        table = Table.from_json(stored)
    else:

        def vet(item: Item, result: Result) -> None:
            check_result(metric, item, result, profile.space)

        def compute(task: Task, items: Sequence[Item]) -> list[Result]:
            return run.compute(task, items, "sensitivity", vet=vet)

        table = FILLS[metric.name](compute, subject)
        check_finite(metric, table, profile.space)
        if "data" in metric.needs:
            table = with_idle_units_noted(table, profile.space)
        put_result(run.engine, key, "sensitivity", {"metric": metric.name} | table.to_json(), time.monotonic() - began)
    for note in table.notes:
        run.notice(f"{metric.name}: {note}")
    run.summary["tables"][metric.name] = key
    run.summary["metrics"][metric.name] = estimate | {
        "seconds": time.monotonic() - began,
        "reused": stored is not None,
        "in_loss_units": metric.in_loss_units,
        "notes": list(table.notes),
    }
    run.save()
    return table


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
        raise _not_finite(metric, f" for {_listed(names)}" if names else "")


def with_idle_units_noted(table: Table, space: Space) -> Table:
    """The table with a note that names the units for which it predicts no loss, whatever they are rounded to."""
    rounds = space.allowed & np.array([scheme != FULL_PRECISION for scheme in space.schemes])
    idle = rounds.any(axis=1) & ~(rounds & (table.values.to_numpy() != 0)).any(axis=1)
    names = [unit.name for unit, row in zip(space.units, idle, strict=True) if row]
    if not names:
        return table
    them = "it" if len(names) == 1 else "them"
    note = (
        f"no loss is predicted at any scheme for {_listed(names)}: "
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


def _listed(names: Sequence[str]) -> str:
    """At most five names; the others are counted."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def optimize(run: Run, profile: Profile, tables: dict[str, Table], baselines: Sequence[Candidate]) -> list[Candidate]:
    """Correct the predictions with the measured baselines, and sweep the budget on each metric's.

    A signed prediction below zero counts as zero: an integer program would heap up rounding errors that seem to heal.

    Returns the baselines and the proposals, the latter unmeasured.
    """
    run.enter("optimize", len(tables))
    request, space = run.request, profile.space
    measured = {candidate.label: candidate.loss for candidate in baselines}
    uniform = [
        (column, choice, loss)
        for column, scheme in enumerate(space.schemes)
        if (choice := space.uniform(scheme)) is not None and (loss := measured[f"uniform {scheme}"]) is not None
    ]
    corrected, sweeps = {}, {}
    for done, (metric, table) in enumerate(tables.items(), start=1):
        predicted = _prediction(table)
        factors = scheme_factors(predicted, uniform)
        corrected[metric] = predicted * factors
        texts = [str(scheme) for scheme in space.schemes]
        run.summary["correction"][metric] = dict(zip(texts, factors.tolist(), strict=True))
        solutions = frontier(
            corrected[metric], profile.costs, profile.bounds, axes(profile.bounds)[0], request.optimizer.points
        )
        unproved = sum(solution.status != "optimal" for solution in solutions)
        if unproved:
            run.notice(f"{unproved} of the {len(solutions)} integer programs on {metric} hit their time limit")
        sweeps[metric] = [solution.choice for solution in solutions if solution.choice is not None]
        queue.progress(run.engine, run.claim, "optimize", done, len(tables))
    run.save()
    drafts = Drafts(space, profile.costs, corrected)
    again = {candidate.label: candidate.predicted for candidate in drafts.baselines()}
    baselines = [replace(candidate, predicted=again[candidate.label]) for candidate in baselines]
    return drafts.proposals(baselines, sweeps, request.optimizer.evaluations)


def measure(run: Run, profile: Profile, candidates: Sequence[Candidate], stage: Stage) -> list[Candidate]:
    """Measure the candidates that are not yet, on the held-out split; judge all as results come."""
    judged = list(candidates)
    waiting = [index for index, candidate in enumerate(judged) if candidate.loss is None]
    run.enter(stage, len(waiting))
    limit, over = run.request.budgets.loss_increase, axes(profile.bounds)

    def measured(position: int, samples: Result) -> None:
        index = waiting[position]
        judged[index] = replace(judged[index], metrics=metrics(samples))
        judged[:] = judge(judged, profile.bounds, limit, over)
        candidate = judged[index]
        put_candidates(run.engine, run.claim, judged)
        described = {"number": candidate.number, "label": candidate.label, "source": candidate.source}
        add_event(
            run.engine,
            run.claim.search_id,
            "measured",
            described | {"loss": candidate.loss, "costs": candidate.costs},
        )

    judged[:] = judge(judged, profile.bounds, limit, over)
    put_candidates(run.engine, run.claim, judged)
    items = [{"allocation": judged[index].allocation, "split": "held_out"} for index in waiting]
    run.compute(MEASURE, items, stage, measured)
    return judged


def tell_if_nothing_fits(run: Run, candidates: Sequence[Candidate]) -> None:
    """A loss budget may turn out too tight only once everything is measured."""
    losses = [candidate.loss for candidate in candidates if candidate.loss is not None]
    if not any(candidate.fits for candidate in candidates) and losses:
        run.notice(f"no measured configuration keeps every budget; the least measured loss is {min(losses):.3g}")


def agreement(candidates: Sequence[Candidate]) -> dict[str, dict[str, float | int | None]]:
    """Rank correlation of each metric's predictions with the measured losses.

    Without the uniform baselines: their measurements have corrected the predictions.
    """
    measured = [one for one in candidates if one.loss is not None and one.source != "uniform"]
    losses = [candidate.loss for candidate in measured if candidate.loss is not None]
    metrics = candidates[0].predicted if candidates else {}
    return {
        metric: {
            "spearman": spearman([candidate.predicted[metric] for candidate in measured], losses),
            "points": len(measured),
        }
        for metric in metrics
    }


def _prediction(table: Table) -> NDArray[np.float64]:
    clamped: NDArray[np.float64] = table.values.clip(lower=0.0).to_numpy()
    return clamped


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
