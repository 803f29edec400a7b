"""How long work takes on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.autotune import graph_microseconds

Run = Callable[[], object]

COLD_RUNS = 11


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one product: replayed in a CUDA graph over rotated weights, and launched on cold caches."""

    graph: float
    cold: float


class Stopwatch:
    """Times work on the present device."""

    def __init__(self) -> None:
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(4 * self.cache_bytes, dtype=torch.uint8, device="cuda")

    def copies(self, size: int) -> int:
        """How many copies of so many bytes are together larger than three times the cache."""
        return 1 + 3 * self.cache_bytes // size

    def times(self, runs: Sequence[Run]) -> Times:
        """Of one of `runs`, the same work on copies of the weight; each has been run before."""
        return Times(graph_microseconds(runs), self._cold(runs[0]))

    def copy_bandwidth(self) -> float:
        """Bytes a second that a large copy on the device reads and writes."""
        source = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / (graph_microseconds([lambda: target.copy_(source)]) * 1e-6)

    def _cold(self, run: Run) -> float:
        took = []
        for _ in range(COLD_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            took.append(1e3 * start.elapsed_time(end))
        return statistics.median(took)


def random_codes(rows: int, columns: int, bits: int = 8) -> Tensor:
    """Random codes of so many bits on the GPU; zeros run faster than what is random."""
    most = 2 ** (bits - 1)
    return torch.randint(-most, most, (rows, columns), dtype=torch.int8, device="cuda")
