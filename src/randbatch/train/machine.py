"""What a result was made with: device, memory, versions, commit."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import randbatch

__all__ = ["commit", "peak_memory", "pick_device", "reset_peak_memory", "versions"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def pick_device(name: str) -> torch.device:
    """The device called `name`; `"auto"` is the GPU if there is one, otherwise the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch finds no GPU")
    return device


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak anew. On a CPU this needs Linux; elsewhere the peak is that of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # resets VmHWM, see proc(5)


def peak_memory(device: torch.device) -> int:
    """Bytes: the peak of torch's allocator on a GPU, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


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
