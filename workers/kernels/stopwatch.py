"""How long calls take on a device, when nothing that they read is in its last cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from search.latency_profile import Quantiles

Call = Callable[[], object]

CACHES = 3
"""So many times the last cache is read to empty it of everything else."""
CPU_CACHE = 32 * 2**20
"""Bytes: of a CPU's last cache torch says nothing."""
REPLAYS, LAUNCHES, WARM = 50, 20, 3
"""How often calls are measured either way, and how many are made before."""


class Stopwatch(Protocol):
    """Times calls on one device."""

    cache_bytes: int
    """Of the device's last cache."""

    def replayed(self, calls: Sequence[Call]) -> Quantiles:
        """Of one of several calls that are made one after the other. Raises RuntimeError where they cannot be."""

    def cold(self, calls: Sequence[Call]) -> Quantiles:
        """Of a call that is made on an idle device; the calls take turns."""


def stopwatch(device: torch.device) -> Stopwatch:
    """The one of a device."""
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()


class CudaStopwatch:
    """By events on a stream; calls that are made one after the other are captured in a CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._other = torch.ones(CACHES * self.cache_bytes // 4, device=device)

    def replayed(self, calls: Sequence[Call]) -> Quantiles:
        """Of a replay of the graph of all calls, shared out among them. While the cache is emptied, the graph is
        launched: its launch takes no time of its own."""
        with torch.cuda.device(self._device):
            graph = self._captured(calls)
            return quantiles([self._microseconds(graph.replay) / len(calls) for _ in range(REPLAYS)])

    def cold(self, calls: Sequence[Call]) -> Quantiles:
        """From before the launch, which Python makes, to the end of what it launches."""
        with torch.cuda.device(self._device):
            for call in calls[:WARM]:
                call()
            return quantiles([self._microseconds(calls[at % len(calls)], idle=True) for at in range(LAUNCHES)])

    def _captured(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        stream, present = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            for call in (*calls[:WARM], calls[0]):
                call()
        present.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        for _ in range(WARM):
            graph.replay()
        return graph

    def _microseconds(self, call: Call, *, idle: bool = False) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # Read, not written: what is written goes to memory only when it makes room, in the time of the call.
        self._other.sum()
        if idle:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end))


class CpuStopwatch:
    """By the clock of the process."""

    cache_bytes = CPU_CACHE

    def __init__(self) -> None:
        self._other = torch.ones(CACHES * CPU_CACHE // 4)

    def replayed(self, calls: Sequence[Call]) -> Quantiles:
        """Of calls that take turns; what they read is in no cache if together they read more than one holds."""
        for call in calls[:WARM]:
            call()
        return quantiles([_microseconds(calls[at % len(calls)]) for at in range(REPLAYS)])

    def cold(self, calls: Sequence[Call]) -> Quantiles:
        """Of a call after the cache was emptied."""
        times = []
        for at in range(LAUNCHES):
            self._other.sum()
            times.append(_microseconds(calls[at % len(calls)]))
        return quantiles(times)


def quantiles(microseconds: Sequence[float]) -> Quantiles:
    """To the nanosecond."""
    return Quantiles(*(max(round(float(value), 3), 0.001) for value in np.quantile(microseconds, (0.1, 0.5, 0.9))))


def _microseconds(call: Call) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e3
