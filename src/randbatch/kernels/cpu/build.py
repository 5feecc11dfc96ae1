"""Compiles the C++ beside it on the machine that runs it, once; later processes find the result in the user's cache.

The cache is `$XDG_CACHE_HOME/randbatch`, by default `~/.cache/randbatch`; a file in it is named by all that it depends
on: the source, the command, the compiler and the processor. `$CXX` names the compiler; without it the first of c++, g++
and clang++ is taken.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

__all__ = ["library", "why_not_built"]

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp")  # torch's threads are OpenMP's too


def _compiler() -> list[str] | None:
    """The command of the C++ compiler."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


def _processor() -> str:
    """What decides which instructions there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@cache
def _folder() -> Path:
    """Of this user alone, since what lies there is run."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder = base / "randbatch"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError:
        pass  # no home to write to: this process compiles for itself
    folder = Path(tempfile.mkdtemp(prefix="randbatch-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _build(name: str, *defines: str) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if os.name != "posix":
        return f"it is for Linux and other POSIX systems, got {platform.system()}"
    compiler = _compiler()
    if compiler is None:
        return "it needs a C++ compiler with OpenMP: install g++ or clang++, or name one in $CXX"
    source = Path(__file__).with_name(f"{name}.cpp")
    command = [*compiler, *_FLAGS, *(f"-D{define}" for define in defines)]
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        parts = (source.read_bytes(), shlex.join(command).encode(), version, _processor().encode())
        path = _folder() / f"{name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / path.name
                subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, check=True)
                made.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode(errors="replace").strip() if isinstance(error, subprocess.CalledProcessError) else ""
        reason = f"`{shlex.join(command)}` failed: {said.splitlines()[-1] if said else error}"
        warnings.warn(
            f"{source.name} could not be built, torch's own functions are taken instead; {reason}", stacklevel=2
        )
        return reason


def why_not_built(name: str, *defines: str) -> str | None:
    """None once `NAME.cpp` is built with these definitions, otherwise the reason."""
    built = _build(name, *defines)
    return built if isinstance(built, str) else None


def library(name: str, *defines: str) -> ctypes.CDLL:
    """The functions of `NAME.cpp`, with these definitions."""
    built = _build(name, *defines)
    if isinstance(built, str):
        raise RuntimeError(built)
    return built
