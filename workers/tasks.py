"""Tasks: pure functions of an evaluator and a small item, whose results are kept by content."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from search import allocation
from search.errors import UnsupportedModel
from search.metrics import Metric
from search.space import Space
from workers.calibration import one_item, sample_count
from workers.evaluator import Evaluator
from workers.fingerprint import ModelChanged
from workers.layers import used_outside
from workers.loss import has_labels

Item = dict[str, Any]
"""Plain JSON: it is part of the result's key."""
Result = dict[str, Any]
"""Plain JSON."""


@dataclass(frozen=True, slots=True)
class Task:
    """A named function; `version` is raised when its results change; `uses_data`: whether they depend on the data;
    `deploys`: whether they depend on how an evaluator multiplies by rounded weights."""

    name: str
    version: int
    run: Callable[[Evaluator, Item], Result]
    uses_data: bool = True
    deploys: bool = False


class Compute(Protocol):
    """Runs a task on many items, reusing stored results; results come in the items' order."""

    def __call__(self, task: Task, items: Sequence[Item], /) -> list[Result]:
        """Results in the order of `items`."""
        ...


@dataclass(frozen=True, slots=True)
class Content:
    """What every result of a search depends on besides its task and item."""

    model_digest: str
    data_digest: str
    quantizer: str
    arithmetic: str = "rounding"
    """How evaluators multiply by rounded weights: `rounding`, or `kernels`."""

    def key(self, task: Task, item: Item) -> str:
        """Content key of a result."""
        data = self.data_digest if task.uses_data else None
        arithmetic = [self.arithmetic] if task.deploys else []
        return content_key([task.name, task.version, self.model_digest, data, self.quantizer, *arithmetic, item])

    def table_key(self, metric: Metric, space: Space) -> str:
        """Content key of a metric's table over a space."""
        data = self.data_digest if "data" in metric.needs else None
        units = [[layer.name for layer in unit.layers] for unit in space.units]
        asked = [[unit.name for unit in space.units], units, list(map(str, space.schemes)), space.allowed.tolist()]
        return content_key(["table", metric.name, metric.version, self.model_digest, data, self.quantizer, asked])


@dataclass(frozen=True, slots=True)
class Checked:
    """A task's function, for an evaluator that has the model and the data that were described.

    An evaluator that was built later, or on another machine, may have found other files.
    """

    function: Callable[[Evaluator, Item], Result]
    model: str
    content: Content

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, evaluator: Evaluator, item: Item) -> Result:
        """Raises ModelChanged, before anything is computed, where the evaluator has others."""
        found = evaluator.loaded.digest, evaluator.data.digest
        if found == (self.content.model_digest, self.content.data_digest):
            return self.function(evaluator, item)
        other = "the files" if found[0] != self.content.model_digest else "the calibration data"
        raise ModelChanged(
            f"{other} of '{self.model}' changed while it was searched, or differ on another machine that evaluates",
            field="model" if found[0] != self.content.model_digest else "calibration.dataset",
            value=self.model,
            accepted="files that are equal on every machine, and stay so while a search runs; then search again",
        )


def content_key(content: object) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def above_broken_numbers(value: Any) -> set[str]:
    """The keys on the way to every number in a result that is not finite: none when all are."""
    return {key for keys, leaf in _leaves(value) if isinstance(leaf, float) and not math.isfinite(leaf) for key in keys}


def texts(value: Any) -> set[str]:
    """Every key and text in an item."""
    return {text for keys, leaf in _leaves(value) for text in (*keys, leaf) if isinstance(text, str)}


def _leaves(value: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The texts, numbers and nulls of plain JSON, each with the keys that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*above, key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, above)
    else:
        yield above, value


def _describe(evaluator: Evaluator, _item: Item) -> Result:
    batches = evaluator.batches("calibration")
    # Only to find out now, not when everything else is done, that it is not finite there.
    evaluator.measure({}, "acceptance")
    return {
        "inventory": evaluator.inventory.to_json(),
        "data_digest": evaluator.data.digest,
        "arithmetic": "kernels" if evaluator.kernels else "rounding",
        "batch_sizes": list(map(sample_count, batches)),
        "documents": list(evaluator.data.documents or range(sum(map(sample_count, batches)))),
        "labelled": has_labels(evaluator.loaded.task, batches[0]),
        "full_precision": evaluator.measure({}),
        "forward_seconds": forward_seconds(evaluator),
        "used_outside": used_outside(
            evaluator.loaded.model, evaluator.layers.values(), lambda: evaluator.loaded(one_item(evaluator.loaded))
        ),
    }


@torch.no_grad()
def forward_seconds(evaluator: Evaluator) -> float:
    """Of a forward pass over the calibration split, at full precision and once everything is warm.

    Raises UnsupportedModel when an output is not finite: no metric could say anything.
    """
    began = time.perf_counter()
    batches = evaluator.batches("calibration")
    finite = [evaluator.loaded(batch).flatten(1).isfinite().all(dim=1) for batch in batches]
    broken = int((~torch.cat(finite)).sum())
    seconds = time.perf_counter() - began
    if broken:
        raise UnsupportedModel(
            f"the output of this {evaluator.loaded.architecture} is not finite on {broken} of the "
            f"{sum(map(len, finite))} calibration samples",
            field="model",
            value=evaluator.loaded.architecture,
            accepted="a model that is finite on the calibration data; on half precision, BITFRONTIER_DTYPE=float32",
        )
    return seconds


def _measure(evaluator: Evaluator, item: Item) -> Result:
    batches = range(*item["batches"]) if "batches" in item else None
    return dict(evaluator.measure_samples(allocation.from_json(item["allocation"]), item["split"], batches))


DESCRIBE = Task("describe", 2, _describe)
"""Item: empty. Result: inventory, digest of the data, how it multiplies, sizes of the calibration batches, the
documents of their samples, whether there are labels, full-precision metrics, the seconds of a forward pass over the
calibration split, and the layers whose weights are `used_outside` of them."""

MEASURE = Task("measure", 3, _measure, deploys=True)
"""Item: an `allocation` (layer → scheme text), a `split`, and the first and the end of its `batches` where not all are
asked for. Result: that of `Evaluator.measure_samples`."""
