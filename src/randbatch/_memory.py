"""How much memory is free."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["free_bytes"]

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on `device`.

    On a GPU what the driver has free and what torch's allocator keeps unused; on a CPU what Linux calls available,
    within the limit of the container. Other systems do not tell: a quarter of the physical memory.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(min(_available(), _left_in_container()))


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _left_in_container() -> int | float:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:  # no container, or not one of version 2
        return float("inf")
    return float("inf") if limit == "max" else max(0, int(limit) - used)
