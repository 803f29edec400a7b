"""A pool of evaluators as Ray actors, on this machine or a cluster: it grows and shrinks with the room that there is.

Ray restarts and repeats nothing: an evaluator that is lost, with its process or machine, is replaced, and another does
its item.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from workers.cluster import start_ray
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.pools.demand import Demand, demand_on_processors
from workers.pools.gpus import GpuDemand
from workers.pools.protocol import Function, TaskTimedOut, WorkersLost, always, nothing
from workers.settings import pool_size, task_seconds
from workers.tasks import Item, Result

log = logging.getLogger(__name__)

LOST_WORKER_RETRIES = 3
TIMEOUT_RETRIES = 1

POLL_SECONDS = 0.2
"""Between two looks at who has to stop."""

LOOK_SECONDS = 1.0
"""Between two looks at what room the cluster has."""

WAIT_SECONDS = 10.0
"""How long no evaluator gets a place before that is told. A process of Ray's takes some seconds to start."""


PREFIX = "evaluator/"
"""Of an actor's name: then its pool's, and its number in it."""


@dataclass(slots=True, eq=False)
class _Worker:
    """An actor, and what it is at: getting a place, loading the model, an item, one that its map left, or nothing."""

    actor: Any
    at: Literal["place", "load", "item", "left", "nothing"]
    result: Any
    """Ray's reference to what it is at."""
    index: int = -1
    deadline: float = 0.0


class RayPool:
    """Evaluators as Ray actors, this pool's share of what the cluster has room for.

    Pools that share a cluster see one another by their actors' names, and take equal shares of it; what one does not
    want another may have. `BITFRONTIER_POOL_SIZE` caps a share.
    """

    def __init__(self, spec: EvaluatorSpec) -> None:
        self.spec = spec
        self.on_wait: Callable[[str], None] = log.info
        self._ray = start_ray()
        self._most = pool_size()
        self._load_seconds = self._item_seconds = task_seconds()
        self._id = secrets.token_hex(4)
        self._started = 0
        self._workers: list[_Worker] = []
        self._wanted = 0
        self._looked = self._placed = -float("inf")
        self._told = False
        self._deaths = self._late = 0
        """Evaluators that died before they took an item, and that took too long to load, since one did neither."""
        self._known: Demand | None = None
        self._gpu_demand = GpuDemand(self._ray, spec)

    def __len__(self) -> int:
        return self._share()

    @property
    def held(self) -> int:
        """How many evaluators have been asked for and not let go of."""
        return len(self._workers)

    @property
    def ready(self) -> int:
        """How many evaluators have loaded the model, as far as the last map saw."""
        return sum(worker.at in ("item", "left", "nothing") for worker in self._workers)

    def prepare(self) -> None:
        """Begin to build evaluators, without waiting for them."""
        self._fit()

    def map(
        self,
        function: Function,
        items: Sequence[Item],
        check: Callable[[], None] = nothing,
        more: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Result]]:
        """Give each evaluator that is ready one item at a time.

        An item whose evaluator is lost is repeated up to `LOST_WORKER_RETRIES` times, then it is WorkersLost; one that
        takes longer than `BITFRONTIER_TASK_SECONDS` is repeated once, then it is TaskTimedOut; so is loading the model.
        """
        waiting = deque(range(len(items)))
        lost: Counter[int] = Counter()
        late: Counter[int] = Counter()
        self._placed, self._told = time.monotonic(), False
        try:
            while waiting or any(worker.at == "item" for worker in self._workers):
                self._check(check)
                if not more():
                    waiting.clear()
                if waiting:
                    self._look()
                for worker in [worker for worker in self._workers if worker.at == "nothing"]:
                    self._give(worker, function, items, waiting)
                for worker in self._overdue():
                    self._drop(worker)
                    if worker.at == "load":
                        self._await_no_more()
                    if worker.at != "item":
                        continue
                    late[worker.index] += 1
                    if late[worker.index] > TIMEOUT_RETRIES:
                        raise self._timed_out(
                            f"'{function.__name__.strip('_')}'", self._item_seconds, TIMEOUT_RETRIES + 1
                        )
                    waiting.appendleft(worker.index)
                for worker in self._finished():
                    index, was = worker.index, worker.at
                    try:
                        result = self._ray.get(worker.result)
                    except self._ray.exceptions.RayTaskError as error:
                        self._advance(worker)
                        if was == "left":
                            continue
                        if was == "load":
                            self._drop(worker)
                        raise error.cause from None
                    except self._ray.exceptions.RayError as error:
                        self._drop(worker)
                        self._bury(error, was, lost, index)
                        if was == "item":
                            waiting.appendleft(index)
                        continue
                    self._advance(worker)
                    if was == "item":
                        if more():
                            self._give(worker, function, items, waiting)
                        yield index, result
        finally:
            for worker in self._workers:
                if worker.at == "item":
                    worker.at = "left"

    def close(self) -> None:
        """Let the evaluators go; the next map builds others."""
        while self._workers:
            self._drop(self._workers[-1])

    def _check(self, check: Callable[[], None]) -> None:
        """Where it raises, nothing may go on: who is at an item is stopped, and built again by the next map."""
        try:
            check()
        except BaseException:
            for worker in [worker for worker in self._workers if worker.at in ("item", "left")]:
                self._drop(worker)
            raise

    def _give(self, worker: _Worker, function: Function, items: Sequence[Item], waiting: deque[int]) -> None:
        """The next item, unless there are more evaluators than this pool's share: then this one goes."""
        if len(self._workers) > self._wanted:
            self._drop(worker)
        elif waiting:
            worker.index = waiting.popleft()
            worker.at, worker.deadline = "item", time.monotonic() + self._item_seconds
            worker.result = worker.actor.call.remote(function, items[worker.index])

    def _finished(self) -> list[_Worker]:
        """Who has finished what it was at; waits a little for the first."""
        at = {worker.result: worker for worker in self._workers if worker.at != "nothing"}
        if not at:
            time.sleep(POLL_SECONDS)
            return []
        done, _ = self._ray.wait(list(at), num_returns=1, timeout=POLL_SECONDS)
        return [at[reference] for reference in done]

    def _advance(self, worker: _Worker) -> None:
        if worker.at == "place":
            self._placed = time.monotonic()
            worker.at, worker.deadline = "load", time.monotonic() + self._load_seconds
            worker.result = worker.actor.load.remote()
        else:
            self._deaths = self._late = 0
            worker.at, worker.index, worker.result = "nothing", -1, None

    def _overdue(self) -> list[_Worker]:
        now = time.monotonic()
        late = [one for one in self._workers if one.at in ("load", "item", "left") and one.deadline < now]
        # Between two maps nobody looks: some were done in time.
        return [one for one in late if not self._ray.wait([one.result], timeout=0)[0]]

    def _await_no_more(self) -> None:
        """Raise TaskTimedOut where evaluators take too long to load again and again."""
        self._late += 1
        log.warning("an evaluator took longer than %g s to load the model", self._load_seconds)
        if self._late > TIMEOUT_RETRIES * max(1, self._wanted):
            raise self._timed_out("loading the model", self._load_seconds, self._late)

    def _timed_out(self, what: str, seconds: float, times: int) -> TaskTimedOut:
        return TaskTimedOut(
            f"{what} took longer than {seconds:g} s, {times} times",
            field="BITFRONTIER_TASK_SECONDS",
            value=seconds,
            accepted="a longer time limit, or fewer or shorter calibration samples",
        )

    def _bury(self, error: Exception, was: str, lost: Counter[int], index: int) -> None:
        """Raise WorkersLost where evaluators are lost again and again, at one item or before they take any."""
        log.warning("an evaluator was lost: %s", str(error).splitlines()[0])
        if was == "item":
            lost[index] += 1
            if lost[index] > LOST_WORKER_RETRIES:
                raise WorkersLost(f"the evaluators died {lost[index]} times at one item: {error}") from error
        elif was != "left":
            self._deaths += 1
            if self._deaths > LOST_WORKER_RETRIES * max(1, self._wanted):
                raise WorkersLost(f"{self._deaths} evaluators died while they loaded the model: {error}") from error

    def _look(self) -> None:
        """Fit the pool to the cluster from time to time, and tell when it waits for room."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._fit()
        if any(worker.at != "place" for worker in self._workers):
            self._placed, self._told = now, False
        elif now - self._placed > WAIT_SECONDS and not self._told:
            self._told = True
            self.on_wait(self._why_it_waits())

    def _why_it_waits(self) -> str:
        asked, free, all_of_it = self._demand(), self._ray.available_resources(), self._ray.cluster_resources()
        has = ", ".join(f"{free.get(kind, 0):g} of {all_of_it.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
        others = len(self._others())
        sharing = f", which {others} other {'worker shares' if others == 1 else 'workers share'}" if others else ""
        return f"waiting for an evaluator, which takes {asked or 'a GPU'}: the cluster{sharing} has {has} free"

    def _fit(self) -> None:
        """Start evaluators, or let go of them, as many as this pool's share says; busy ones go after their item."""
        demand, self._wanted = self._demand(), self._share()
        while demand and len(self._workers) < self._wanted:
            self._start(demand)
        order = ["place", "load", "nothing", "left", "item"]
        surplus = max(0, len(self._workers) - self._wanted)
        for worker in sorted(self._workers, key=lambda worker: order.index(worker.at))[:surplus]:
            if worker.at not in ("left", "item"):
                self._drop(worker)

    def _share(self) -> int:
        demand, others = self._demand() or Demand(1, 1), self._others()
        room = sum(map(demand.fit, self._machines()))
        pools = sorted([*others, self._id])
        fair, rest = divmod(room, len(pools))
        fair += pools.index(self._id) < rest
        # Where there is no room at all, one waits for it.
        return max(1, min(max(fair, room - sum(others.values())), self._most or room))

    def _others(self) -> Counter[str]:
        """The evaluators of other pools in the cluster, by pool."""
        names = [name.split("/") for name in self._ray.util.list_named_actors() if name.startswith(PREFIX)]
        return Counter(pool for _, pool, _ in names if pool != self._id)

    def _demand(self) -> Demand | None:
        """What an evaluator asks for, once that is known; from then on it stays."""
        if self._known is None and self.spec.device == "cuda":
            self._known = self._gpu_demand.known()
        elif self._known is None:
            self._known = demand_on_processors(self._machines())
        return self._known

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _start(self, demand: Demand) -> None:
        actor = (
            self._ray.remote(_Actor)
            .options(
                name=f"{PREFIX}{self._id}/{self._started}",
                num_cpus=demand.cpus,
                num_gpus=demand.gpus,
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(self.spec, demand)
        )
        self._started += 1
        self._workers.append(_Worker(actor, "place", actor.place.remote()))

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.actor)


class _Actor:
    """An evaluator in a process of its own."""

    def __init__(self, spec: EvaluatorSpec, demand: Demand) -> None:
        torch.set_num_threads(demand.cpus)
        # Over several GPUs a model is spread.
        self._spec = replace(spec, device="auto") if demand.gpus > 1 else spec
        self._evaluator: Evaluator | None = None

    def place(self) -> None:
        """Nothing: once it is done there is a process."""

    def load(self) -> None:
        self._evaluator = Evaluator.build(self._spec, shared=True)

    def call(self, function: Function, item: Item) -> Result:
        assert self._evaluator is not None
        return function(self._evaluator, item)
