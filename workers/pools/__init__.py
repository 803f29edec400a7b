"""Pools of evaluators: Ray's, on this machine or a cluster, and one in this process behind the same protocol."""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.cluster import has_gpus
from workers.evaluator import EvaluatorSpec
from workers.pools.inprocess import InProcessPool
from workers.pools.protocol import Function, Pool, TaskTimedOut, WorkersLost
from workers.pools.ray_pool import RayPool
from workers.settings import PoolKind, pool_kind

__all__ = [
    "POOLS",
    "Function",
    "InProcessPool",
    "Pool",
    "RayPool",
    "TaskTimedOut",
    "WorkersLost",
    "device",
    "open_pool",
]

POOLS: dict[PoolKind, Callable[[EvaluatorSpec], Pool]] = {"ray": RayPool, "inprocess": InProcessPool}


def open_pool(spec: EvaluatorSpec) -> Pool:
    """The pool that `BITFRONTIER_POOL` asks for: `ray` (default) or `inprocess`. Raises WrongSetting for another, and
    ClusterOpen where Ray would be open to everyone."""
    return POOLS[pool_kind()](spec)


def device() -> str:
    """What evaluators compute on: `cuda` where their pool can have GPUs, else `cpu`. Raises as `open_pool` does."""
    return "cuda" if (has_gpus() if pool_kind() == "ray" else torch.cuda.is_available()) else "cpu"
