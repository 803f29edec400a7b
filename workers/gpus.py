"""How this machine's GPUs are used, as far as that can be told without touching one."""

from __future__ import annotations

import torch

from db.workers import Gpu


def gpu_use() -> list[Gpu]:
    """Of all GPUs by pynvml, where it is installed; else, by torch, of those that this process uses already."""
    try:
        return _by_driver()
    except Exception:  # pynvml and the driver below it fail in many ways, and none of them matters here.
        return _by_torch()


def _by_driver() -> list[Gpu]:
    import pynvml

    pynvml.nvmlInit()
    try:
        return [_of(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _of(device: object) -> Gpu:
    import pynvml

    name, memory = pynvml.nvmlDeviceGetName(device), pynvml.nvmlDeviceGetMemoryInfo(device)
    try:
        utilisation = pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
    except pynvml.NVMLError:
        utilisation = None
    return {
        "name": name.decode() if isinstance(name, bytes) else name,
        "memory_used_bytes": int(memory.used),
        "memory_total_bytes": int(memory.total),
        "utilisation": utilisation,
    }


def _by_torch() -> list[Gpu]:
    # Asking torch would take hundreds of megabytes of a GPU that only other processes use.
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    found: list[Gpu] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(
            {"name": name, "memory_used_bytes": total - free, "memory_total_bytes": total, "utilisation": None}
        )
    return found
