"""Pools of evaluators: Ray's, on this machine or a cluster, and one in this process behind the same protocol."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch

from search.errors import BitfrontierError
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.tasks import Item, Result

log = logging.getLogger(__name__)

Function = Callable[[Evaluator, Item], Result]

LOST_WORKER_RETRIES = 3
OBJECT_STORE_BYTES = 200 * 2**20
"""Items and results are small; Ray's default would take a third of the memory."""


class Pool(Protocol):
    """Evaluators of one spec. `map` gives each result as it comes; what a function raises, it raises."""

    spec: EvaluatorSpec
    described: Result | None
    """What is known of the model and its data, once a search has asked; it holds for all that share the pool."""

    def __len__(self) -> int:
        """How many evaluators there are."""
        ...

    def map(self, function: Function, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """(index, result) of every item, in any order."""
        ...

    def close(self) -> None:
        """Let the evaluators go."""
        ...


class InProcessPool:
    """One evaluator in this process, with all of torch's threads."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        self.spec = spec
        self.described: Result | None = None
        self._evaluator: Evaluator | None = None

    def __len__(self) -> int:
        return 1

    def map(self, function: Function, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Run the items one after the other."""
        if self._evaluator is None:
            self._evaluator = Evaluator.build(self.spec)
        for index, item in enumerate(items):
            yield index, function(self._evaluator, item)

    def close(self) -> None:
        """Drop the model."""
        self._evaluator = None


class RayPool:
    """Evaluators as Ray actors: one per GPU of the cluster, else `evaluators_per_node()` that share a node's threads.

    An actor whose process or node dies is built again elsewhere and its task repeated, a few times.
    """

    def __init__(self, spec: EvaluatorSpec) -> None:
        self.spec = spec
        self.described: Result | None = None
        self._ray = ray = start_ray()
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if spec.device == "cuda" else 0
        nodes = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]]
        threads = max(1, int(min(nodes)))
        each = min(evaluators_per_node(), threads)
        options = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": threads // each}
        count = gpus or len(nodes) * each
        actor = ray.remote(_Actor).options(
            max_restarts=LOST_WORKER_RETRIES, max_task_retries=LOST_WORKER_RETRIES, **options
        )
        self._actors = [actor.remote(spec, options["num_cpus"]) for _ in range(count)]

    def __len__(self) -> int:
        return len(self._actors)

    def map(self, function: Function, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Give each actor one item at a time. Raises what the function raised; a BitfrontierError when actors are lost
        for good."""

        ray = self._ray
        waiting = iter(enumerate(items))
        running: dict[Any, tuple[int, Any]] = {}

        def give(actor: Any) -> None:
            index, item = next(waiting, (None, None))
            if index is not None:
                running[actor.call.remote(function, item)] = (index, actor)

        for actor in self._actors:
            give(actor)
        try:
            while running:
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                index, actor = running.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    raise WorkersLost(f"the evaluators died {LOST_WORKER_RETRIES} times: {error}") from error
                give(actor)
                yield index, result
        finally:
            for reference in running:
                ray.cancel(reference, force=False)

    def close(self) -> None:
        """Stop the actors."""

        for actor in self._actors:
            self._ray.kill(actor)


class WorkersLost(BitfrontierError):
    """The processes that evaluate died again and again."""

    status = 503
    type = "workers-lost"
    title = "The evaluating processes died"


class _Actor:
    def __init__(self, spec: EvaluatorSpec, threads: int) -> None:
        torch.set_num_threads(threads)
        self._pool = InProcessPool(spec)

    def call(self, function: Function, item: Item) -> Result:
        return next(self._pool.map(function, [item]))[1]


def open_pool(spec: EvaluatorSpec) -> Pool:
    """The pool that `BITFRONTIER_POOL` asks for: `ray` (default) or `inprocess`."""
    kind = os.environ.get("BITFRONTIER_POOL", "ray")
    pools: dict[str, Callable[[EvaluatorSpec], Pool]] = {"ray": RayPool, "inprocess": InProcessPool}
    if kind not in pools:
        raise ValueError(f"BITFRONTIER_POOL is '{kind}'; accepted: {', '.join(pools)}")
    return pools[kind](spec)


def evaluators_per_node() -> int:
    """`BITFRONTIER_EVALUATORS` (default 1). Raises ValueError when it is no positive number.

    Small models leave most of many cores idle: several evaluators with a few threads each use them.
    """
    text = os.environ.get("BITFRONTIER_EVALUATORS", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"BITFRONTIER_EVALUATORS is '{text}'; accepted: a whole number, at least 1")
    return int(text)


def start_ray() -> ModuleType:
    """Ray, joined to the cluster at `RAY_ADDRESS`, else started on this machine, open to holders of a fresh token only.

    It is imported here and not before: it reads its authentication from the environment when it is imported.
    """
    local = os.environ.get("RAY_ADDRESS", "local") == "local"
    # Ray listens on every interface, and whoever can talk to it can run code here.
    if local and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if not ray.is_initialized():
        common = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "bitfrontier"}
        alone = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        ray.init(**common, **(alone if local else {}))
    module: ModuleType = ray
    return module


def stop_ray() -> None:
    """Leave the cluster; a local one ends."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
