"""The fastest plan of a shape on this GPU: timed when `launch.tune` asks, then remembered in memory and in a file.

Nothing here is needed for the first call: a shape that was never timed has its default plan. The file is JSON under
XDG_CACHE_HOME, an entry for each GPU, driver, text of the kernels and problem; what no longer is a candidate is passed
over, and so is what cannot be read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from workers.kernels.compile import SOURCES, write_at_once
from workers.kernels.plans import Plan, Problem, bucket, candidates, default

_CHOSEN: dict[Problem, Plan] = {}


class Entry(TypedDict):
    """A plan as the file has it, and what it took."""

    kernel: str
    slices: int
    microseconds: float


def chosen(problem: Problem) -> Plan:
    """The plan to use: of the problem's bucket of tokens the one remembered, else the default."""
    plan = _CHOSEN.get(problem)
    if plan is None:
        plan = _CHOSEN[problem] = recalled(problem) or default(problem)
    return plan


def recalled(problem: Problem) -> Plan | None:
    """The plan that the file has for the problem, if it still is a candidate."""
    entry = _entries().get(key(problem))
    if not isinstance(entry, dict):
        return None
    wanted = (entry.get("kernel"), entry.get("slices"))
    return next((plan for plan in candidates(problem) if (plan.kernel.name, plan.slices) == wanted), None)


def remember(problem: Problem, plan: Plan, microseconds: float) -> None:
    """Use the plan from now on, and in later processes; where the file cannot be written, warn that they will not."""
    _CHOSEN[problem] = plan
    entry: Entry = {"kernel": plan.kernel.name, "slices": plan.slices, "microseconds": microseconds}
    try:
        write_at_once(cache_file(), json.dumps(_entries() | {key(problem): entry}, indent=1).encode())
    except OSError as error:
        warnings.warn(f"the fastest plan is forgotten when this process ends: {error}", stacklevel=2)


def key(problem: Problem) -> str:
    """Names all that the fastest plan depends on."""
    machine = problem.machine
    parts = (
        f"{machine.name}, {machine.multiprocessors} multiprocessors, {machine.architecture}",
        f"driver {machine.driver}",
        sources_digest(),
        str(problem.scheme),
        f"{problem.rows} × {problem.columns} × {bucket(problem.tokens)}",
        str(problem.dtype).removeprefix("torch."),
    )
    return "; ".join(parts)


def fastest(
    plans: Sequence[Plan], runs: Callable[[Plan], Sequence[Callable[[], object]]], device: torch.device
) -> tuple[Plan, float]:
    """Of some plans the one that takes least on a device, and the microseconds of one run.

    `runs` gives calls of the same work on other copies of the weight, larger together than the cache.
    """
    with torch.cuda.device(device):
        times = [graph_microseconds(runs(plan)) for plan in plans]
    best = min(range(len(plans)), key=times.__getitem__)
    return plans[best], times[best]


def graph_microseconds(runs: Sequence[Callable[[], object]], replays: int = 9, milliseconds: float = 2) -> float:
    """Of one of `runs` on the current device, where they take turns in a CUDA graph of some milliseconds: of its
    replays the median.

    Everything they need must be compiled before.
    """
    once = min(_milliseconds(_captured(runs).replay) for _ in range(2))
    turns = max(1, round(milliseconds / once))
    graph = _captured([*runs] * turns)
    graph.replay()
    return 1e3 * statistics.median(_milliseconds(graph.replay) for _ in range(replays)) / (turns * len(runs))


@functools.cache
def sources_digest() -> str:
    """Of the text of all kernels, in 16 hexadecimal digits."""
    texts = [path.read_bytes() for path in sorted(SOURCES.glob("*.cuh"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def cache_file() -> Path:
    """Where plans are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitfrontier" / "plans.json"


def _entries() -> dict[str, Any]:
    """What the file has, nothing where it has no object. Its values may be anything."""
    try:
        found = json.loads(cache_file().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _captured(runs: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_capture_stream(torch.cuda.current_device())):
        for run in runs:
            run()
    return graph


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Torch's own for captures lies on whatever device was current at the first."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _milliseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
