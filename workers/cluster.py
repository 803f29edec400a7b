"""Ray, on this machine or a cluster: how it is joined, and what is asked of it besides actors."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import torch

from search.errors import BitfrontierError
from workers.settings import LOCAL

OBJECT_STORE_BYTES = 200 * 2**20
"""Items and results are small; Ray's default would take a third of the memory."""

NAMESPACE = "bitfrontier"
"""Of the names of actors: all workers of a cluster see one another's."""


class ClusterOpen(BitfrontierError):
    """A cluster without token authentication: whoever reaches it can run code on its machines."""

    status = 503
    type = "cluster-open"
    title = "The Ray cluster is open to everyone"


def start_ray() -> ModuleType:
    """Ray, joined to the cluster at `RAY_ADDRESS`, else started on this machine.

    It is imported here and not before: it reads its authentication from the environment when it is imported.
    Raises ClusterOpen as `authenticate` does.
    """
    authenticate()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else whatever is asked of Ray before this, or after it was left, starts another one with settings of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # What a lost evaluator would have said, when nobody waits for it any more.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Ray prints a paragraph for every process that it loses, past all logs; the pool says what was lost.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or LOCAL
        common = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
        alone = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        ours = signal.getsignal(signal.SIGTERM)
        ray.init(address, **common, **(alone if address == LOCAL else {}))
        # Ray takes the signal that asks a worker to stop, and would end it in the middle of its search.
        if callable(ours) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)
    module: ModuleType = ray
    return module


def authenticate() -> None:
    """See to it that Ray asks for a token: a fresh one where it is to be started on this machine.

    Ray listens on every interface, and whoever can talk to it can run code here. Raises ClusterOpen where
    `RAY_ADDRESS` is set and no token is, unless `RAY_AUTH_MODE` says what is wanted.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if not has_token():
        if (os.environ.get("RAY_ADDRESS") or LOCAL) != LOCAL:
            raise ClusterOpen(
                "RAY_ADDRESS is set and there is no token: whoever reaches a cluster that asks for none can run code "
                "on it",
                field="RAY_AUTH_TOKEN",
                accepted="the cluster's token in RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH; or "
                "RAY_AUTH_MODE=disabled, where nobody else can reach the cluster",
            )
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token"


def has_token() -> bool:
    """Whether Ray will find a token: in the environment, or in the file where it looks for one."""
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


def has_gpus() -> bool:
    """Whether evaluators can have a GPU: one that torch can use on this machine, or any of the cluster joined."""
    if (os.environ.get("RAY_ADDRESS") or LOCAL) == LOCAL:
        return torch.cuda.is_available()
    return bool(start_ray().cluster_resources().get("GPU"))


def stop_ray() -> None:
    """Leave the cluster; a local one ends."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
