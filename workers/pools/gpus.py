"""How many GPUs an evaluator of a model needs: asked of a machine that has GPUs and sees the model."""

from __future__ import annotations

import logging
import math
import subprocess
import time
from types import ModuleType
from typing import Any

import torch

from workers.evaluator import EvaluatorSpec
from workers.headers import read_gguf, read_safetensors
from workers.pools.demand import Demand, demand_on_gpus
from workers.settings import gpus_per_evaluator, task_seconds
from workers.sources import find_model

log = logging.getLogger(__name__)

ASK = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]


class GpuDemand:
    """What an evaluator of `spec` asks for in a cluster that has GPUs."""

    def __init__(self, ray: ModuleType, spec: EvaluatorSpec) -> None:
        self._ray, self._spec = ray, spec
        self._asked: Any = None
        self._until = 0.0
        """When the answer is no longer waited for."""
        self._known = demand_on_gpus(None, None) if gpus_per_evaluator() is not None else None

    def known(self) -> Demand | None:
        """The answer, once there is one. Does not wait for it."""
        if self._known is None and self._asked is None:
            self._asked, self._until = self._ask(), time.monotonic() + task_seconds()
        if self._known is not None or self._asked is None:
            return self._known
        if self._ray.wait([self._asked], timeout=0)[0]:
            try:
                self._known = demand_on_gpus(*self._ray.get(self._asked))
            except self._ray.exceptions.RayTaskError as error:
                # Loading it will say what is wrong with the model.
                log.warning("the size of the model is not known: %s", error.cause)
                self._known = demand_on_gpus(None, None)
            except self._ray.exceptions.RayError:
                self._asked = None
        elif time.monotonic() > self._until:
            log.warning("the size of the model is not known: its files do not answer")
            self._known = demand_on_gpus(None, None)
        return self._known

    def _ask(self) -> Any:
        machines = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        if not machines:
            return None
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(machines[0]["NodeID"], soft=False)
        task = self._ray.remote(_sizes).options(num_cpus=0, scheduling_strategy=there)
        return task.remote(self._spec)


def _sizes(spec: EvaluatorSpec) -> tuple[int, int | None]:
    return weight_bytes(spec), smallest_gpu()


def weight_bytes(spec: EvaluatorSpec) -> int:
    """Bytes of a model's weights in what it computes in. Raises UnsupportedModel when it cannot be found or read."""
    found = find_model(spec.source)
    read = read_gguf if found.gguf else read_safetensors
    shapes = [shape for name, file in found.weights.items() for shape in read(file, name).values()]
    return sum(map(math.prod, shapes)) * int(getattr(torch, spec.dtype).itemsize)


def smallest_gpu() -> int | None:
    """Bytes of memory of the smallest GPU of this machine; None where that is not known."""
    try:
        told = subprocess.run(ASK, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        return min(map(int, told)) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
