"""Whether a model fits: what a search of it needs, against what is free. Asked before a weight is read."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from search.errors import ModelTooLarge

LOADING = 2.0
"""Of the weights in float32, what loading takes at its peak: a GGUF file is unpacked beside the model (1.5 to 1.8 times
the weights of SmolLM2-135M were measured)."""

SEARCHING = 3.0
"""Of the weights as they are computed in, what a search takes: themselves, those a candidate rounds, and gradients.

Measured at its peak: 2.3 times SmolLM2-135M (538 MB) with `fisher`, and 4.8 times MiniLM (90 MB) with `kl`, `fisher` or
`hessian_trace`: as 1.8 times the weights and `BESIDES` would give.
"""

BESIDES = 270_000_000
"""Bytes that a search takes however small the model is."""

_CGROUPS = Path("/sys/fs/cgroup")


def check_fits(name: str, weights: int, itemsize: int, *devices: torch.device) -> None:
    """Raise ModelTooLarge unless a search of `weights` numbers of `itemsize` bytes each fits on `devices` of one kind.

    They are loaded into the machine's memory in float32 first, wherever they are then computed with.
    """
    loading, searching = int(LOADING * weights * 4), BESIDES + int(SEARCHING * weights * itemsize)
    kind = devices[0].type
    on_cpu = kind == "cpu"
    _check(name, max(loading, searching) if on_cpu else loading, free_bytes(torch.device("cpu")), "this machine")
    if not on_cpu:
        where = f"its {kind.upper()} device" if len(devices) == 1 else f"its {len(devices)} {kind.upper()} devices"
        _check(name, searching, sum(map(free_bytes, devices)), where)


def check_loads(name: str, file_bytes: int) -> None:
    """Raise ModelTooLarge for weights whose files alone, which hold nothing wider than float32, are too much here."""
    _check(name, int(LOADING * file_bytes), free_bytes(torch.device("cpu")), "this machine")


def free_bytes(device: torch.device) -> int:
    """What may still be allocated: the GPU's free memory; else what the machine has and the container may have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_container_headroom()])


def _check(name: str, needed: int, free: int, where: str) -> None:
    if needed > free:
        raise ModelTooLarge(
            f"{name} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {where}: "
            f"{(needed - free) / 1e9:.1f} GB short; a search keeps {SEARCHING:g} times the weights in memory. Run a "
            "worker where more is free, or set BITFRONTIER_DTYPE=bfloat16, which halves what a search keeps",
            field="model",
            value=name,
            accepted=f"a model that needs at most {free / 1e9:.1f} GB",
        )


def _container_headroom() -> list[int]:
    """What every limit of a control group above this process leaves, in bytes; none where there is no limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _headrooms(_CGROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            found += _headrooms(_CGROUPS / "memory", path, *files)
    return found


def _headrooms(mount: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[int]:
    own = mount / path.strip("/")
    groups = [group for group in (own, *own.parents) if group.is_relative_to(mount)]
    return [left for group in groups if (left := _headroom(group, limit, usage, reclaimable)) is not None]


def _headroom(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # The cache of files is counted as used, and given back when something else needs the room.
    return None if most == "max" else max(0, int(most) - used + int(stat.get(reclaimable, 0)))
