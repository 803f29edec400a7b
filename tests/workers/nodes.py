"""Several of Ray's nodes on this machine, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from workers.cluster import authenticate, stop_ray

STORE = 80 * 2**20
"""Bytes of a node's object store, near the least that Ray takes."""

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 60_000,
    "health_check_failure_threshold": 3,
}
"""A dead node, which refuses connections, is found dead after some 4 s, by Ray's own settings after some 20 s; one that
answers late, on a busy machine, is not dead."""


@contextmanager
def three_nodes() -> Iterator[Any]:
    """Within, a `ray.cluster_utils.Cluster` of three nodes of one core each, and `RAY_ADDRESS` and a token in the
    environment: for pools here, and for workers in processes of their own.

    `cluster.add_node(num_cpus=1, object_store_memory=STORE)` adds one, and
    `cluster.remove_node(node, allow_graceful=False)` kills one; not the head, which has the cluster's books and is the
    node of whoever joins from here.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_ENABLE_AUTO_CONNECT", "0")
        environment.delenv("RAY_ADDRESS", raising=False)
        authenticate()
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": STORE}
        head = node | {"include_dashboard": False, "_system_config": HEALTH}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(**node)
            environment.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            stop_ray()
            cluster.shutdown()
