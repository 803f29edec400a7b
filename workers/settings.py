"""What a worker may be told: read from the environment, with what is accepted. An empty variable is one left out."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import Literal, cast, get_args

import torch

from search.errors import BitfrontierError
from workers.kernels.backend import check_named, deploys

Dtype = Literal["float32", "bfloat16"]
PoolKind = Literal["ray", "inprocess"]

AUTO = "auto"
LOCAL = "local"

MOST_SECONDS = 366 * 86_400.0


class WrongSetting(BitfrontierError):
    """An environment variable holds what is not accepted."""

    type = "wrong-setting"
    title = "A setting is not accepted"


def check_settings() -> None:
    """Read all, before a search suffers from one. Raises WrongSetting, or KernelError for a backend that cannot."""
    for read in (lease, grace, idle, patience, task_seconds):
        read()
    for choose in (dtype, pool_kind, pool_size, evaluators_per_node, gpus_per_evaluator):
        choose()
    if is_elsewhere():
        check_named()
    else:
        deploys(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def lease() -> timedelta:
    """`BITFRONTIER_LEASE_SECONDS` (60): how long a silent worker keeps its search."""
    return timedelta(seconds=_seconds("BITFRONTIER_LEASE_SECONDS", 60))


def grace() -> float:
    """`BITFRONTIER_GRACE_SECONDS` (20): how long what is under way may take once the worker is asked to stop."""
    return _seconds("BITFRONTIER_GRACE_SECONDS", 20)


def idle() -> float:
    """`BITFRONTIER_IDLE_SECONDS` (60): how long a worker without a search keeps its evaluators."""
    return _seconds("BITFRONTIER_IDLE_SECONDS", 60)


def patience() -> float:
    """`BITFRONTIER_PATIENCE_SECONDS` (60): how long a search waits for a database that is away."""
    return _seconds("BITFRONTIER_PATIENCE_SECONDS", 60)


def task_seconds() -> float:
    """`BITFRONTIER_TASK_SECONDS` (3600): how long an item may take, and how long an evaluator may load its model."""
    return _seconds("BITFRONTIER_TASK_SECONDS", 3600)


def dtype() -> Dtype:
    """`BITFRONTIER_DTYPE` (float32): what models compute in."""
    return cast(Dtype, _one_of("BITFRONTIER_DTYPE", get_args(Dtype)))


def pool_kind() -> PoolKind:
    """`BITFRONTIER_POOL` (ray): where evaluators run."""
    return cast(PoolKind, _one_of("BITFRONTIER_POOL", get_args(PoolKind)))


def is_elsewhere() -> bool:
    """Whether evaluators run in a cluster that this worker joins at `RAY_ADDRESS`."""
    return pool_kind() == "ray" and (os.environ.get("RAY_ADDRESS") or LOCAL) != LOCAL


def evaluators_per_node() -> int:
    """`BITFRONTIER_EVALUATORS` (1). Small models leave most of many cores idle: several evaluators with a few threads
    each use them."""
    return _whole("BITFRONTIER_EVALUATORS") or 1


def pool_size() -> int | None:
    """`BITFRONTIER_POOL_SIZE`: the most evaluators that one worker takes of a cluster; None: as many as there are."""
    return _whole("BITFRONTIER_POOL_SIZE")


def gpus_per_evaluator() -> float | None:
    """`BITFRONTIER_GPUS_PER_EVALUATOR`: part of a GPU, or a whole number of them; None, for `auto` (default): one, or
    as many as the model needs."""
    variable = "BITFRONTIER_GPUS_PER_EVALUATOR"
    text = os.environ.get(variable) or AUTO
    if text == AUTO:
        return None
    number = _number(text)
    if not 0 < number < math.inf or (number > 1 and number != int(number)):
        raise _wrong(variable, text, f"'{AUTO}', a number between 0 and 1, or a whole number")
    return number


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable) or str(default)
    if not 0 < _number(text) <= MOST_SECONDS:
        raise _wrong(variable, text, "a number of seconds, more than 0 and at most a year's")
    return float(text)


def _whole(variable: str) -> int | None:
    text = os.environ.get(variable) or None
    if text is not None and not (text.isdecimal() and int(text) >= 1):
        raise _wrong(variable, text, "a whole number, at least 1")
    return int(text) if text else None


def _one_of(variable: str, accepted: tuple[str, ...]) -> str:
    """The first is the default."""
    text = os.environ.get(variable) or accepted[0]
    if text not in accepted:
        raise _wrong(variable, text, ", ".join(accepted))
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _wrong(variable: str, text: str, accepted: str) -> WrongSetting:
    told = f"{variable} is '{text}'; accepted: {accepted}"
    return WrongSetting(told, field=variable, value=text, accepted=accepted)
