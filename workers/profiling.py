"""The profile stage: what is known of a model and a request before anything is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from sqlalchemy import Engine

from db import queue
from db.latency import latency_of
from db.models import get_model, put_model
from search.budget import Bound
from search.cost import Cost, Resource
from search.errors import InvalidCalibration, UnsupportedModel
from search.feasibility import check_feasible
from search.inventory import Inventory
from search.limits import costs_and_bounds
from search.metrics import METRICS
from search.proposals import axes
from search.request import SearchRequest
from search.space import Space, build_space
from search.targets import find_target
from workers.datasets import path_of
from workers.evaluator import EvaluatorSpec
from workers.fingerprint import fingerprint
from workers.models import HUB, dtype
from workers.run import Run, listed
from workers.tasks import DESCRIBE, Content


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known before anything is quantized."""

    inventory: Inventory
    space: Space
    costs: dict[Resource, Cost]
    bounds: list[Bound]
    axes: list[Resource]
    """The resources the frontier is drawn over; the search sweeps the first."""
    batch_sizes: tuple[int, ...]
    forward_seconds: float


def source_of_model(engine: Engine, name: str) -> str:
    """Where a model comes from: a registered source, or the hub.

    Raises UnsupportedModel for a name that is neither registered nor a hub id.
    """
    model = get_model(engine, name)
    if model is None and "/" not in name:
        raise UnsupportedModel(
            f"there is no registered model '{name}'",
            field="model",
            value=name,
            accepted="a registered name (GET /v1/models), or a Hugging Face id such as org/name",
        )
    return model.source if model else HUB + name


def evaluator_spec(engine: Engine, request: SearchRequest) -> EvaluatorSpec:
    """Where the requested model comes from (a registered source, or the hub), and the data to feed it."""
    source = source_of_model(engine, request.model)
    dataset = request.calibration.dataset
    return EvaluatorSpec(
        source=source,
        calibration=request.calibration,
        quantizer=request.space.quantizer,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=dtype(),
        files=fingerprint(Path(source), *filter(None, [path_of(dataset) if dataset else None])),
    )


def profile_model(run: Run) -> Profile:
    """Load the model, enumerate layers, tie units, fill the cost tables; refuse what cannot be met."""
    run.enter("profile", 1)
    described = run.pool.described = run.pool.described or next(run.pool.map(DESCRIBE.run, [{}]))[1]
    inventory = Inventory.from_json(described["inventory"])
    request, spec = run.request, run.pool.spec
    model = get_model(run.engine, request.model)
    if model is None or model.source == spec.source:
        put_model(run.engine, request.model, spec.source, inventory)
    run.content = Content(inventory.digest, described["data_digest"], request.space.quantizer, described["arithmetic"])

    check_labels(request, labelled=described["labelled"])
    space = build_space(inventory, request.space, find_target(request.target))
    latency = latency_of(run.engine, request)
    costs, bounds = costs_and_bounds(space, inventory, request.budgets, latency)
    if loose := described["used_outside"]:
        run.notice(
            f"the model also uses the weights of {listed(loose)} outside of their layers: kl, pqi, higgs, gradient "
            "and autoscheme do not see that use, and predict too little; measured losses do"
        )
    check_feasible(costs, bounds)
    over = axes(bounds, request.optimizer.objective)
    run.summary |= {
        "model_digest": inventory.digest,
        "data_digest": described["data_digest"],
        "arithmetic": described["arithmetic"],
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
        "axes": over,
        "feasible": {name: {"min": cost.smallest, "max": cost.largest} for name, cost in costs.items()},
        "full_precision": {
            name: value for name, value in described["full_precision"].items() if not name.startswith("loss")
        },
        "tables": {},
        "metrics": {},
    }
    if latency is not None:
        run.summary["latency"] = latency.summary(inventory.digest)
    run.save()
    queue.progress(run.engine, run.claim, "profile", 1, 1)
    return Profile(inventory, space, costs, bounds, over, tuple(described["batch_sizes"]), described["forward_seconds"])


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


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
