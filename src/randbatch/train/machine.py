"""What a result was made with: device, memory, versions, commit."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

import randbatch
from randbatch import _windows
from randbatch._errors import InvalidValue

__all__ = ["check_device", "commit", "peak_memory", "pick_device", "reset_peak_memory", "versions"]

_DEVICE = re.compile(r"auto|cpu|cuda(?::(?:0|[1-9]\d{0,3}))?")

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def check_device(name: str) -> str:
    """Return the name of a device if it is one that runs are made on, be it here or not."""
    if _DEVICE.fullmatch(name) is None:
        raise InvalidValue(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', got {name[:80]!r}")
    return name


def pick_device(name: str) -> torch.device:
    """The device called `name`; `"auto"` is the GPU if there is one, otherwise the CPU.

    Raises:
        InvalidValue: no such device is known, or none is here.
    """
    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidValue(f"device {name!r} was asked for, but torch finds no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidValue(f"device {name!r} was asked for, but torch finds {torch.cuda.device_count()} GPU, from 0 on")
    return device


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak anew. On a CPU this needs Linux, and its leave; elsewhere the peak is that of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        with contextlib.suppress(OSError):  # some containers do not let a process write there
            _CLEAR_REFS.write_text("5", encoding="ascii")  # resets VmHWM, see proc(5)


def peak_memory(device: torch.device) -> int:
    """Bytes: the peak of torch's allocator on a GPU, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return _windows.peak_memory()
    if (peak := _high_water_mark()) is not None:
        return peak
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _high_water_mark() -> int | None:
    """VmHWM of proc(5), None where there is none."""
    try:
        lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    marks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(marks[0]) * 1024 if marks else None


def versions(device: torch.device) -> dict[str, str]:
    """Versions of what computes, and the hardware."""
    found = {"python": platform.python_version(), "randbatch": randbatch.__version__, "torch": torch.__version__}
    for package in ("torch-geometric", "ogb"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return found | {"hardware": hardware, "threads": str(torch.get_num_threads())}


@functools.cache
def commit() -> str | None:
    """The commit of this package's checkout (`…-dirty` if it was changed since), None outside of one.

    The first answer stays for the life of the process: it is the code that was loaded, whatever the checkout becomes.
    """
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    if head is None or git("ls-files", "--error-unmatch", __file__) is None:  # installed inside some other checkout
        return None
    return f"{head}-dirty" if git("status", "--porcelain", "--", str(here)) else head
