"""The profile stage: what is known of a model and a request before anything is quantized."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from sqlalchemy import Engine

from db.latency import latency_of
from db.models import get_model, put_model
from search.budget import Bound
from search.cost import Cost, Resource
from search.errors import InvalidCalibration, UnsupportedModel
from search.feasibility import check_feasible
from search.inventory import Inventory
from search.latency import Latency
from search.latency_profile import from_json, to_json
from search.limits import costs_and_bounds
from search.metrics import METRICS
from search.names import HUB, model_name
from search.proposals import axes
from search.request import SearchRequest
from search.space import Space, build_space
from search.targets import find_target
from workers.datasets import BUILT_IN, path_of
from workers.evaluator import EvaluatorSpec
from workers.fingerprint import fingerprint
from workers.kernels.backend import VARIABLE as KERNELS
from workers.pools import Pool, device
from workers.run import Run, listed
from workers.settings import dtype
from workers.sources import files_behind
from workers.tasks import DESCRIBE, Content, Result, content_key


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
    documents: tuple[int, ...]
    """What each sample of the calibration split was cut from."""
    forward_seconds: float


def source_of_model(engine: Engine, name: str) -> str:
    """Where a model comes from: a registered source, or the hub.

    Raises UnsupportedModel for a name that is neither registered nor a hub id, InvalidRequest for what is no name.
    """
    model = get_model(engine, model_name(name))
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
        device=device(),
        dtype=dtype(),
        files=fingerprint(*files_behind(source), *filter(None, [path_of(dataset) if dataset else None])),
    )


def description_key(run: Run, spec: EvaluatorSpec) -> str:
    """Of what there is to know of a model and its data: the same while their files are, so that a search which has
    nothing to compute loads no model."""
    dataset = spec.calibration.dataset
    # Nobody watches the hub: who asks for what comes from there looks at it anew.
    here = dataset is None or dataset == BUILT_IN or path_of(dataset) is not None
    watched = here and not spec.source.startswith(HUB)
    return content_key(
        [
            [DESCRIBE.name, DESCRIBE.version, None if watched else run.claim.search_id],
            [spec.source, spec.files, spec.calibration.model_dump(mode="json"), spec.quantizer, spec.dtype],
            [_device_name(spec.device), os.environ.get(KERNELS)],
            [platform.python_version(), *map(version, ("torch", "transformers"))],
        ]
    )


def described(run: Run, spec: EvaluatorSpec) -> Result:
    """What evaluators say of the model and its data."""
    run.described_as = description_key(run, spec)
    (found,) = run.results([run.described_as], DESCRIBE, [{}])
    return found


def latency_known(run: Run) -> Latency | None:
    """By what the search counts time, as it was when the search first looked: profiles grow, and others come."""
    if not run.request.counts_latency:
        return None
    key = content_key(["latency", run.claim.search_id, run.request.model_dump(mode="json")])
    kept = run.find("latency", [key])
    if not kept:
        chosen = run.insist(lambda: latency_of(run.engine, run.request))
        assert chosen is not None
        kept = {key: run.keep(key, "latency", {"profile": to_json(chosen.profile), "tokens": chosen.tokens}, 0.0)}
    return Latency(from_json(kept[key]["profile"]), kept[key]["tokens"], run.request.model)


def know_model(run: Run, source: str, inventory: Inventory) -> None:
    """Register what a model is made of, unless it is known, or was registered with another source meanwhile."""
    name = run.request.model
    model = run.insist(lambda: get_model(run.engine, name))
    known = model is not None and model.inventory is not None and model.inventory.digest == inventory.digest
    if not known and (model is None or model.source == source):
        run.insist(lambda: put_model(run.engine, name, source, inventory))


def profile_model(run: Run, pool_for: Callable[[EvaluatorSpec], Pool]) -> Profile:
    """Describe the model, enumerate layers, tie units, fill the cost tables; refuse what cannot be met."""
    run.enter("profile", 1)
    request, spec = run.request, run.insist(lambda: evaluator_spec(run.engine, run.request))
    run.pool = pool_for(spec)
    run.pool.on_wait = run.notice
    about = described(run, spec)
    inventory = Inventory.from_json(about["inventory"])
    know_model(run, spec.source, inventory)
    run.content = Content(inventory.digest, about["data_digest"], request.space.quantizer, about["arithmetic"])

    check_labels(request, labelled=about["labelled"])
    space = build_space(inventory, request.space, find_target(request.target))
    latency = latency_known(run)
    costs, bounds = costs_and_bounds(space, inventory, request.budgets, latency)
    if loose := about["used_outside"]:
        run.notice(
            f"the model also uses the weights of {listed(loose)} outside of their layers: kl, pqi, higgs, gradient "
            "and autoscheme do not see that use, and predict too little; measured losses do"
        )
    check_feasible(costs, bounds)
    over = axes(bounds, request.optimizer.objective)
    run.summary |= {
        "model_digest": inventory.digest,
        "data_digest": about["data_digest"],
        "arithmetic": about["arithmetic"],
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
            name: value for name, value in about["full_precision"].items() if not name.startswith("loss")
        },
        "evaluators": run.evaluators,
        "tables": run.summary.get("tables", {}),
        "metrics": run.summary.get("metrics", {}),
    }
    if latency is not None:
        run.summary["latency"] = latency.summary(inventory.digest)
    run.save()
    run.progress("profile", 1, 1)
    batch_sizes, documents = tuple(about["batch_sizes"]), tuple(about["documents"])
    return Profile(inventory, space, costs, bounds, over, batch_sizes, documents, about["forward_seconds"])


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
    if device == "cpu":
        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'s' if threads != 1 else ''}"
    # The GPUs of a cluster need not be this machine's.
    return torch.cuda.get_device_name() if torch.cuda.is_available() else device
