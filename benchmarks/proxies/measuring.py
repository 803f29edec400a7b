"""What is measured of a model, each piece kept: the losses of its configurations, and every metric's table."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.proxies.configurations import Choices, draw, enumerate_all
from benchmarks.proxies.subjects import Study
from search.allocation import layer_schemes
from search.metrics import METRICS
from search.space import Space
from workers import sensitivity
from workers.calibration import sample_count
from workers.evaluator import Evaluator
from workers.loss import has_labels
from workers.sensitivity import FILLS, Subject, Table
from workers.tasks import Content, Item, Result, Task, content_key, forward_seconds

CACHE = Path(__file__).parents[1] / ".cache"

MOST_PASSES = 600
"""A metric that takes more forward passes than this on a model is left out there."""

SPLITS = ("calibration", "held_out")


class OutOfTimeError(Exception):
    """What there is to do is not done within the time given; what is done is kept."""


@dataclass(frozen=True)
class Timed:
    """A metric's table, the seconds it took on an evaluator that had computed nothing, and those of a forward pass
    over the calibration split."""

    table: Table
    seconds: float
    forward_seconds: float


@dataclass(frozen=True)
class Measured:
    """A study's configurations with their bands (nan: none) and losses on both splits, and the metrics' tables.

    `left_out` says of each metric that has no table why.
    """

    study: Study
    space: Space
    choices: Choices
    bands: NDArray[np.float64]
    losses: dict[str, NDArray[np.float64]]
    tables: dict[str, Timed]
    left_out: dict[str, str]


def measure(study: Study, until: float, again: Sequence[str] = (), losses_only: bool = False) -> Measured:
    """Measure what is not kept yet. Raises OutOfTimeError at `until`, in seconds of `time.monotonic`.

    The tables of the metrics named in `again` are filled anew.
    """
    evaluator = study.build()
    space = study.space(evaluator)
    content = Content(evaluator.loaded.digest, evaluator.data.digest, evaluator.quantizer)
    names = [[unit.name for unit in space.units], [str(scheme) for scheme in space.schemes]]
    key = content_key([content.model_digest, content.data_digest, content.quantizer, names])
    folder = CACHE / f"{study.name}-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)

    choices, bands = draw(space, study.bands) if study.bands else enumerate_all(space)
    losses = _losses(evaluator, space, choices, folder / "losses.jsonl", until)
    tables: dict[str, Timed] = {}
    left_out: dict[str, str] = {}
    for name in () if losses_only else FILLS:
        if "labels" in METRICS[name].needs and not _labelled(evaluator):
            left_out[name] = "no labels"
        elif (passes := METRICS[name].forward_passes(space)) > MOST_PASSES:
            left_out[name] = f"{passes:.0f} forward passes"
        else:
            tables[name] = _table(evaluator, space, content, name, folder, until, name in again)
    return Measured(study, space, choices, bands, losses, tables, left_out)


def _losses(
    evaluator: Evaluator, space: Space, choices: Choices, file: Path, until: float
) -> dict[str, NDArray[np.float64]]:
    """By split, in the order of `choices`."""
    lines = file.read_text().splitlines() if file.exists() else []
    known = {tuple(line["choice"]): line for line in map(json.loads, lines)}
    remaining = [choice for choice in choices if tuple(choice.tolist()) not in known]
    with file.open("a") as stream, remembering(evaluator):
        for index, choice in enumerate(remaining):
            _check_time(until, f"{len(remaining) - index} of {len(choices)} configurations remain to be measured")
            allocation = layer_schemes(space, choice)
            line = {"choice": choice.tolist()}
            line |= {split: evaluator.measure(allocation, split)["loss"] for split in SPLITS}
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            known[tuple(line["choice"])] = line
    return {split: np.array([known[tuple(choice.tolist())][split] for choice in choices]) for split in SPLITS}


@contextmanager
def remembering(evaluator: Evaluator) -> Iterator[None]:
    """Within, every rounded weight and every full-precision output is kept: thousands of configurations share them."""
    evaluator.weight, evaluator.reference = cache(evaluator.weight), cache(evaluator.reference)  # type: ignore[method-assign]
    try:
        yield
    finally:
        evaluator.apply({})
        del evaluator.weight, evaluator.reference


def _table(
    evaluator: Evaluator, space: Space, content: Content, name: str, folder: Path, until: float, again: bool
) -> Timed:
    # A metric that was changed is another, whether or not its version says so already.
    key = content_key([content.table_key(METRICS[name], space), _sources(FILLS[name].__module__, {})])
    file = folder / f"{name}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if again or kept.get("key") != key:
        _check_time(until, f"the table of {name} remains to be filled")
        evaluator.apply({})
        plain_pass = min(forward_seconds(evaluator) for _ in range(2))
        # As good as new: it has chosen no grid and kept no output.
        evaluator._grids.clear()
        evaluator._references.clear()
        evaluator.reached.clear()
        began = time.perf_counter()
        table = fill(name, evaluator, space)
        kept = {
            "key": key,
            "table": table.to_json(),
            "seconds": time.perf_counter() - began,
            "forward_seconds": plain_pass,
        }
        file.write_text(json.dumps(kept))
        print(f"{folder.name}: {name} in {kept['seconds']:.1f} s", flush=True)
    return Timed(Table.from_json(kept["table"]), kept["seconds"], kept["forward_seconds"])


def _sources(module: str, found: dict[str, str]) -> dict[str, str]:
    """Hashes of the source of a module, and of those of its package whose functions and classes it uses."""
    if module not in found:
        found[module] = hashlib.sha256(inspect.getsource(sys.modules[module]).encode()).hexdigest()
        for value in vars(sys.modules[module]).values():
            used = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or ""
            if used.startswith(f"{sensitivity.__name__}."):
                _sources(used, found)
    return found


def fill(name: str, evaluator: Evaluator, space: Space) -> Table:
    """A metric's table on the calibration split."""

    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        return [task.run(evaluator, item) for item in items]

    sizes = tuple(map(sample_count, evaluator.batches("calibration")))
    return FILLS[name](compute, Subject(space, sizes, frozenset({name})))


def _labelled(evaluator: Evaluator) -> bool:
    return has_labels(evaluator.loaded.task, evaluator.batches("calibration")[0])


def _check_time(until: float, remains: str) -> None:
    if time.monotonic() > until:
        raise OutOfTimeError(remains)
