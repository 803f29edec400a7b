"""What one evaluator asks of a machine, and how many of them machines have room for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workers.memory import SEARCHING
from workers.settings import evaluators_per_node, gpus_per_evaluator


@dataclass(frozen=True, slots=True)
class Demand:
    """Processor cores, which are also the threads, and GPUs of one evaluator: part of one, one, or several whole."""

    cpus: int
    gpus: float = 0

    def fit(self, resources: Mapping[str, float]) -> int:
        """How many evaluators a machine with so many of Ray's `CPU` and `GPU` has room for."""
        by_cpus = int(resources.get("CPU", 0)) // self.cpus
        if not self.gpus:
            return by_cpus
        gpus = int(resources.get("GPU", 0))
        # Part of a GPU is always part of one.
        return min(by_cpus, gpus * int(1 / self.gpus + 1e-9) if self.gpus < 1 else gpus // int(self.gpus))

    def __str__(self) -> str:
        cores = f"{self.cpus} {'core' if self.cpus == 1 else 'cores'}"
        return f"{cores} and {self.gpus:g} {'GPU' if self.gpus <= 1 else 'GPUs'}" if self.gpus else cores


def demand_on_processors(machines: Iterable[Mapping[str, float]]) -> Demand | None:
    """Of one of `evaluators_per_node()` evaluators that share the smallest machine; a larger one has room for more.
    None as long as no machine offers a core."""
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    return Demand(max(1, min(cores) // evaluators_per_node())) if cores else None


def demand_on_gpus(weight_bytes: int | None, gpu_bytes: int | None) -> Demand:
    """Of an evaluator of a model on GPUs of so much memory each (None: not known)."""
    asked = gpus_per_evaluator()
    if asked is not None:
        return Demand(1, asked)
    return Demand(1, math.ceil(SEARCHING * weight_bytes / gpu_bytes) if weight_bytes and gpu_bytes else 1)
