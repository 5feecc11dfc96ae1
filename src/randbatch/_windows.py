"""What Windows says of memory: it has neither /proc nor `resource`."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

__all__ = ["available_memory", "peak_memory"]


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_: ClassVar = [
        ("size", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    ]


class _ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS."""

    _fields_: ClassVar = [
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        ("working_set", ctypes.c_size_t),
        ("peak_paged_pool", ctypes.c_size_t),
        ("paged_pool", ctypes.c_size_t),
        ("peak_nonpaged_pool", ctypes.c_size_t),
        ("nonpaged_pool", ctypes.c_size_t),
        ("page_file", ctypes.c_size_t),
        ("peak_page_file", ctypes.c_size_t),
    ]


def available_memory() -> int:
    """Bytes of physical memory that are free."""
    status = _MemoryStatus(size=ctypes.sizeof(_MemoryStatus))
    if not _kernel().GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("Windows does not say how much memory is free")
    return status.available


def peak_memory() -> int:
    """Bytes: the largest resident memory that this process has had."""
    kernel = _kernel()
    kernel.GetCurrentProcess.restype = ctypes.c_void_p  # a handle; an int would cut it
    kernel.K32GetProcessMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
    counters = _ProcessMemory(size=ctypes.sizeof(_ProcessMemory))
    if not kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.size):
        raise OSError("Windows does not say how much memory this process has had")
    return counters.peak_working_set


def _kernel() -> Any:
    library: Any = ctypes
    return library.WinDLL("kernel32")
