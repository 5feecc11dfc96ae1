"""How much memory is free, and what does not fit into it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from randbatch import _windows
from randbatch._errors import InvalidValue

__all__ = ["check_memory", "free_bytes", "is_out_of_memory"]

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_NO_MEMORY = ("can't allocate memory", "not enough memory", "size calculation overflowed", "multiplication overflow")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on `device`.

    On a GPU what the driver has free and what torch's allocator keeps unused; on a CPU what Linux or Windows calls
    available, within the limit of the container. Other systems do not tell: a quarter of the physical memory.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(min(_available(), _left_in_container()))


def check_memory(name: str, value: object, least: int, device: torch.device | None = None) -> None:
    """Check that what a setting asks for can fit at all, before anything is made of it.

    Args:
        name: of the setting.
        value: what came.
        least: bytes that it takes at least.
        device: where. Default: the CPU.

    Raises:
        InvalidValue: there is less memory.
    """
    free = free_bytes(device or torch.device("cpu"))
    if least > free:
        raise InvalidValue(
            f"{name} must fit into memory: {value} takes at least {least / 10**9:.3g} GB, {free / 1e9:.3g} GB are free"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch found no memory, or a size that no memory has."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _available() -> int:
    if sys.platform == "win32":
        return _windows.available_memory()
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux, or one that does not say
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _left_in_container() -> int | float:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except OSError:  # no container, or not one of version 2
        return float("inf")
    return float("inf") if limit == "max" else max(0, int(limit) - used)
