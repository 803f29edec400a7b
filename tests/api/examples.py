"""A search of a small encoder as a worker would leave it: real spaces and costs, made-up losses."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta
from itertools import cycle, pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from db.candidates import put_candidates
from db.events import tell
from db.latency import latency_of
from db.models import put_model
from db.queue import claim, fail, progress, succeed
from db.results import put_result
from db.searches import create_search, set_summary
from search.allocation import layer_schemes, to_json
from search.budget import cost_bounds
from search.candidate import Candidate, Source
from search.cost import cost_tables
from search.inventory import Inventory, Layer
from search.metrics import METRICS
from search.pareto import undominated
from search.prices import share_prices
from search.proposals import axes
from search.reference import reference
from search.request import SearchRequest
from search.space import Space, build_space
from search.surrogate import Features, Surrogate
from search.sweep import Sweep
from search.targets import find_target

Measured = Literal["held out", "calibration", ""]

MODEL = "all-minilm-l6-v2"
REQUEST = {
    "model": MODEL,
    "target": "vllm",
    "space": {"schemes": ["w4a16g64", "w5a16g64", "w6a16g64", "w8a16g64"], "quantizer": "mse"},
    "budgets": {"avg_bits": 5.25, "size_mb": 40},
    "sensitivity": ["hessian_trace", "kl", "pqi", "lrp"],
    "optimizer": {"points": 16},
}
ACTIVATIONS = {"schemes": ["w4a16g64", "w8a8", "w8a16g64"], "quantizer": "mse"}
"""A space with a scheme that rounds activations."""
NOTES = {
    "pqi": [
        "no loss is predicted at any scheme for pooler.dense: the loss does not depend on it, or rounding hardly "
        "changes it"
    ],
    "lrp": ["no relevance rule for <Gelu>: its relevance is gradient × input"],
}
LEASE = timedelta(minutes=5)


def encoder(blocks: int = 6, hidden: int = 384) -> Inventory:
    """A BERT encoder with its embedding and pooler."""

    def block(index: int) -> list[Layer]:
        name = f"encoder.layer.{index}"
        shapes = {
            "attention.self.query": (hidden, hidden),
            "attention.self.key": (hidden, hidden),
            "attention.self.value": (hidden, hidden),
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (4 * hidden, hidden),
            "output.dense": (hidden, 4 * hidden),
        }
        return [Layer(f"{name}.{leaf}", "linear", *shape, shape[0] * shape[1], name) for leaf, shape in shapes.items()]

    layers = [Layer("embeddings.word_embeddings", "embedding", 30522, hidden)]
    layers += [layer for index in range(blocks) for layer in block(index)]
    layers += [Layer("pooler.dense", "linear", hidden, hidden, hidden * hidden)]
    return Inventory("d" * 64, "BertModel", "embedding", 22_713_216, tuple(layers))


def store_model(engine: Engine, name: str = MODEL) -> Inventory:
    """Register the encoder."""
    inventory = encoder()
    put_model(engine, name, "somewhere", inventory)
    return inventory


def queued_search(engine: Engine, **changes: Any) -> int:
    """A search nobody has claimed."""
    return create_search(engine, SearchRequest.model_validate(REQUEST | changes))[0].id


def claimed_search(engine: Engine, **changes: Any) -> tuple[int, Any]:
    """A running search and the claim on it."""
    search_id = queued_search(engine, **changes)
    held = claim(engine, "test-worker", LEASE)
    assert held is not None
    assert held.search_id == search_id, "another test has left a search in the queue"
    return search_id, held


def finished_search(engine: Engine, **changes: Any) -> int:
    """A search that has succeeded, with events, tables and candidates."""
    search_id, held = claimed_search(engine, **changes)
    report(engine, held, SearchRequest.model_validate(REQUEST | changes))
    return search_id


def failed_search(engine: Engine, problem: dict[str, Any]) -> int:
    """A search that has failed with `problem`."""
    search_id, held = claimed_search(engine)
    fail(engine, held, problem)
    return search_id


def report(engine: Engine, held: Any, request: SearchRequest) -> None:
    """Write what a worker writes, from profile to success."""
    inventory = store_model(engine)
    summary, candidates = results(engine, inventory, request)
    progress(engine, held, "profile", 1, 1)
    for metric, cost in summary["metrics"].items():
        enter_metric(engine, held, metric, cost["forward_passes"], cost["estimated_seconds"])
        for note in cost["notes"]:
            tell(engine, held, "notice", {"message": f"{metric}: {note}"}, f"notice:{metric}: {note}")
    for stage in ("baselines", "optimize"):
        progress(engine, held, stage, 1, 1)
    set_summary(engine, held, summary)
    measured = [candidate for candidate in candidates if candidate.metrics]
    for index, candidate in enumerate(measured):
        data = {"number": candidate.number, "label": candidate.label, "source": candidate.source}
        data |= {"loss": candidate.loss, "costs": candidate.costs}
        tell(engine, held, "measured", data, f"measured:{candidate.number}")
        progress(engine, held, "measure", index + 1, len(measured))
    put_candidates(engine, held, candidates)
    succeed(engine, held, summary)


def enter_metric(engine: Engine, held: Any, metric: str, passes: float, seconds: float) -> None:
    """Say that a metric begins, as a worker does."""
    about = {"metric": metric, "forward_passes": passes, "estimated_seconds": seconds}
    tell(engine, held, "stage", {"stage": "sensitivity", "total": 36} | about, f"stage:{metric}")
    progress(engine, held, "sensitivity", 0, 36)


def results(engine: Engine, inventory: Inventory, request: SearchRequest) -> tuple[dict[str, Any], list[Candidate]]:
    """A summary and candidates: the uniform ones, a mixed one per budget level, the last of these unmeasured, and some
    that were searched on the calibration data alone.

    `pqi` is signed, `lrp` a relative score, and both have notes.
    """
    space = build_space(inventory, request.space, find_target(request.target))
    costs, latency = cost_tables(space, inventory), latency_of(engine, request)
    if latency is not None:
        costs["latency_us"] = latency.cost(space)
    chance = np.random.default_rng(7)
    depth = np.linspace(1.6, 0.5, len(space.units))
    weight = np.array([unit.weights for unit in space.units]) / 6e5 * depth * chance.lognormal(0, 0.9, len(space.units))
    decay = np.array([4.0 ** -(scheme.weight_bits - 4) for scheme in space.schemes])
    loss = 2.4e-3 * weight[:, None] * decay[None, :]
    factors = {metric: 1 + 0.1 * place for place, metric in enumerate(request.sensitivity)}

    bounds = cost_bounds(request.budgets.named())
    over = axes(bounds, request.optimizer.objective)
    sweep = Sweep.of(costs, bounds, over[0], request.optimizer.points)
    surrogate = Surrogate.fit(Features.of(space, {"kl": loss}), np.zeros((0, len(space.units)), np.int64), np.zeros(0))
    errors = np.tile(2.5 * decay / 4**4, (len(space.units), 1))

    def candidate(number: int, source: Any, label: str, choice: Any, measured: Measured = "held out") -> Candidate:
        predicted = float(loss[np.arange(len(choice)), choice].sum())
        totals = {name: cost.total(choice) for name, cost in costs.items()}
        value = predicted * float(chance.lognormal(0.05, 0.06))
        fits = totals["avg_bits"] <= 5.25 and totals["size_bytes"] <= 40e6
        metrics = {"calibration_loss": value / 1.1} if measured else {}
        if measured == "held out":
            metrics |= {"loss": value, "loss_stderr": value / 20, "acceptance_loss": value / 1.02}
        expected = {"loss": predicted, "low": predicted / 1.2, "high": predicted * 1.2} if source != "uniform" else {}
        return Candidate(
            number, source, label, to_json(layer_schemes(space, choice)),
            {metric: predicted * factor for metric, factor in factors.items()}, totals,
            metrics, fits=fits and measured == "held out", expected=expected,
            shadow_prices=share_prices(surrogate.table, costs, {name: totals[name] for name in over}),
        )  # fmt: skip

    uniform = [space.uniform(scheme) for scheme in space.schemes]
    found = [candidate(n, "uniform", f"uniform {space.schemes[n]}", choice) for n, choice in enumerate(uniform)]
    choice = np.zeros(len(space.units), dtype=np.int64)
    steps = [choice.copy()]
    while (choice < len(space.schemes) - 1).any():
        room = np.flatnonzero(choice < len(space.schemes) - 1)
        gain = loss[room, choice[room]] - loss[room, choice[room] + 1]
        best = room[np.argmax(gain / np.array([space.units[row].weights for row in room]))]
        choice[best] += 1
        steps.append(choice.copy())
    picked = steps[2 :: len(steps) // request.optimizer.points]
    for number, step in enumerate(picked, start=len(found)):
        metric = request.sensitivity[number % len(request.sensitivity)]
        bits = costs["avg_bits"].total(step)
        measured = "held out" if number < len(picked) + 3 else ""
        found.append(candidate(number, "ilp", f"{metric} ≤ {bits:.2f} bits", step, measured))
    for step in picked[1:-2:3]:
        tried = step.copy()
        tried[chance.integers(0, len(space.units), 3)] = 1
        label = f"refined, {costs['avg_bits'].total(tried):.2f} bits"
        found.append(candidate(len(found), "refined", label, tried, "calibration"))

    fitting = [c for c in found if c.fits]
    keep = undominated(np.array([[c.costs["avg_bits"], c.metrics["loss"]] for c in fitting]))
    on_frontier = {c.number for c, kept in zip(fitting, keep, strict=True) if kept}
    found = [_marked(c, c.number in on_frontier) for c in found]
    units = [unit.name for unit in space.units]
    schemes = [str(scheme) for scheme in space.schemes]
    rounds_activations = np.array([scheme.quantizes_activations for scheme in space.schemes])
    tables, metrics = {}, {}
    for place, (metric, factor) in enumerate(factors.items()):
        values = loss * factor
        if metric == "pqi":
            values = values * np.where(np.arange(len(units)) % 5 == 2, -0.3, 1.0)[:, None]
        elif metric == "lrp":
            values = values * 1e6
        activation = np.where(rounds_activations, values / 4, 0.0)
        value = {"metric": metric, "units": units, "schemes": schemes, "values": _allowed(space, values),
                 "stderr": _allowed(space, abs(values) / 15), "weight": _allowed(space, values - activation),
                 "activation": _allowed(space, activation), "details": {}, "notes": NOTES.get(metric, [])}  # fmt: skip
        if metric == "pqi":
            value["details"] = {"completeness": {
                scheme: {"measured": total, "shares": total * 0.97, "gap": 0.03, "nodes": 4, "rule": "midpoint"}
                for scheme, total in zip(schemes, loss.sum(axis=0).tolist(), strict=True)
            }}  # fmt: skip
        tables[metric] = f"{metric}-of-the-example-{len(units)}-{'-'.join(schemes)}"
        put_result(engine, tables[metric], "sensitivity", value, 1.5, None)
        metrics[metric] = {"forward_passes": 20.0 + place, "estimated_seconds": 41.0, "seconds": 38.2 * (1 + place),
                           "reused": metric == "kl", "in_loss_units": METRICS[metric].in_loss_units,
                           "notes": NOTES.get(metric, [])}  # fmt: skip
    summary = {
        "model_digest": inventory.digest, "task": inventory.task, "architecture": inventory.architecture,
        "device": "cpu (2 threads)", "data_digest": "e" * 64, "schemes": schemes, "axes": over,
        "units": [{"name": unit.name, "layers": [layer.name for layer in unit.layers], "block": unit.block}
                  for unit in space.units],
        "layers": [{"name": layer.name, "kind": layer.kind, "block": layer.block, "rows": layer.rows,
                    "columns": layer.columns, "macs": layer.macs} for layer in space.layers],
        "feasible": {name: {"min": cost.smallest, "max": cost.largest} for name, cost in costs.items()},
        "reference": asdict(reference(surrogate, sweep, space, errors)), "evaluations": 33.5,
        "acceptance": {"finalists": 12, "accepted": 9}, "coverage": {"level": 0.9, "within": 8, "points": 9},
        "full_precision": {}, "tables": tables, "metrics": metrics, "reused": 3, "computed": 21,
        "agreement": {metric: {"spearman": 0.98 - place / 50, "points": 20} for place, metric in enumerate(metrics)},
    }  # fmt: skip
    if latency is not None:
        summary["latency"] = latency.summary(inventory.digest)
    assert all(a.number < b.number for a, b in pairwise(found))
    return summary, found


def _allowed(space: Space, values: NDArray[np.float64]) -> list[list[float | None]]:
    """As JSON, null where a scheme is not allowed."""
    return [
        [value if allowed else None for value, allowed in zip(*row, strict=True)]
        for row in zip(values.tolist(), space.allowed.tolist(), strict=True)
    ]


def _marked(candidate: Candidate, on_frontier: bool) -> Candidate:
    shadow_prices = candidate.shadow_prices if on_frontier else {}
    return replace(candidate, on_frontier=on_frontier, shadow_prices=shadow_prices)


def deep_search(engine: Engine, blocks: int, **changes: Any) -> int:
    """A search that has succeeded, of an encoder of so many blocks: six layers each, and two more."""
    search_id, held = claimed_search(engine, **changes)
    request, inventory = SearchRequest.model_validate(REQUEST | changes), encoder(blocks, hidden=64)
    weights = sum(layer.weights for layer in inventory.layers)
    inventory = replace(inventory, digest="b" * 64, parameters=weights + 100_000)
    put_model(engine, request.model, "somewhere", inventory)
    summary, candidates = results(engine, inventory, request)
    put_candidates(engine, held, candidates)
    succeed(engine, held, summary)
    return search_id


def large_search(engine: Engine, layers: int, points: int) -> int:
    """A search of a decoder of so many layers that has succeeded with so many candidates, few of them on the frontier.

    All but the best have an empty allocation: pages do not read it.
    """
    search_id, held = claimed_search(engine)
    names = [f"model.layers.{index // 7}.{leaf}" for index, leaf in zip(range(layers), cycle(DECODER), strict=False)]
    costs = np.linspace(4.25, 8.25, points)
    chance = np.random.default_rng(7)
    losses = 2.0 ** (-2 * costs) * np.where(np.arange(points) % (points // 40) == 0, 1, chance.uniform(1.2, 30, points))
    sources: list[Source] = ["uniform", "ilp", "refined", "evolved"]

    def candidate(number: int) -> Candidate:
        cost, loss = float(costs[number]), float(losses[number])
        uniform, searched = number % (points // 3) == 0, number % 3 == 1
        metrics = {"calibration_loss": loss} | ({} if searched else {"loss": loss, "loss_stderr": loss / 20})
        return Candidate(
            number, "uniform" if uniform else sources[1 + number % 3],
            f"uniform w{cost:.0f}a16g64" if uniform else f"refined, {cost:.2f} bits", {},
            {"kl": loss, "fisher": loss}, {"size_bytes": cost * 1e9, "avg_bits": cost, "bitops": cost * 1e11},
            metrics, fits=cost <= 5.25 and not searched, expected={"loss": loss, "low": loss / 1.2, "high": loss * 1.2},
        )  # fmt: skip

    found = [candidate(number) for number in range(points)]
    fitting = [one for one in found if one.fits]
    keep = undominated(np.array([[one.costs["avg_bits"], one.metrics["loss"]] for one in fitting]))
    line = {one.number for one, kept in zip(fitting, keep, strict=True) if kept}
    best = min(fitting, key=lambda one: one.metrics["loss"]).number
    allocation = {name: f"w{4 + index % 5}a16g64" for index, name in enumerate(names)}
    found = [replace(one, on_frontier=one.number in line) for one in found]
    found[best] = replace(found[best], allocation=allocation)
    put_candidates(engine, held, found)
    described = [{"name": name, "kind": "linear", "block": name.rsplit(".", 2)[0], "rows": 4096, "columns": 4096,
                  "macs": 4096**2} for name in names]  # fmt: skip
    units = [{"name": layer["name"], "layers": [layer["name"]], "block": layer["block"]} for layer in described]
    succeed(engine, held, {"axes": ["avg_bits"], "layers": described, "units": units, "full_precision": {}})
    return search_id


DECODER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
