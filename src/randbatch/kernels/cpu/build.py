"""Compiles the C++ beside it on the machine that runs it, once; later processes find the result in the user's cache.

A library in the cache is named by all that it depends on: the source, the command, the compiler and the processor.
`$CXX` names the compiler and may have options; without it the first of c++, g++ and clang++ is taken. Other variables,
`$CPPFLAGS`, `$CXXFLAGS` and `$LDFLAGS`, are not read. No result of a library is used in a process before a first, small
one was right there. For Linux and other POSIX systems.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from randbatch._errors import UserError
from randbatch.kernels.cpu import cache as kept

__all__ = ["Library"]

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp")  # torch's threads are OpenMP's too
_UNDO = (  # what options in $CXX may have switched on: results are those of IEEE 754, and can be called from here
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-fno-finite-math-only",
    "-fno-sanitize=all",
    "-fvisibility=default",
)
_SECONDS = 120.0  # for a compiler, which takes two or three of them; more than that, and it hangs
_SECONDS_TO_ANSWER = 30.0  # for its version
_SHOWN = 300  # characters of what a compiler says

_told: set[str] = set()  # what this process has warned of
_given_up: list[str] = []  # why this process compiles nothing any more


class _BuildError(Exception):
    """There is no library; the message says why."""


@dataclass(frozen=True)
class Library:
    """The functions of `NAME.cpp`, compiled with some definitions.

    Args:
        name: of the source.
        defines: `NAME=value` each.
        check: None if what is loaded computes rightly, otherwise what is wrong. It may call nothing of this class.
    """

    name: str
    defines: tuple[str, ...]
    check: Callable[[ctypes.CDLL], str | None]

    def why_not(self) -> str | None:
        """None once it is built, otherwise the reason."""
        built = _build(self)
        return built if isinstance(built, str) else None

    def functions(self) -> ctypes.CDLL:
        """The functions.

        Raises:
            RuntimeError: `why_not()` has a reason.
        """
        built = _build(self)
        if isinstance(built, str):
            raise RuntimeError(f"{self.name}.cpp is not there: {built}")
        return built


@cache
def _build(library: Library) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if os.name != "posix":
        return f"it is for Linux and other POSIX systems, got {platform.system()}"
    try:
        compiler = _compiler()
        if not compiler:
            return "it needs a C++ compiler with OpenMP: install g++ or clang++, or name one in $CXX"
        defines = (f"-D{define}" for define in library.defines)
        return _find_or_make(library, [*compiler, *_FLAGS, *_UNDO, *defines], _version(tuple(compiler)))
    except (_BuildError, OSError) as failure:
        reason = str(failure)
        _given_up.append(reason)
        _tell("failure", f"{library.name}.cpp could not be used, torch's own functions are taken instead: {reason}")
        return reason


def _tell(kind: str, text: str) -> None:
    """Warn, once in a process."""
    if kind not in _told:
        _told.add(kind)
        warnings.warn(text, stacklevel=2)


def _find_or_make(library: Library, command: Sequence[str], version: str) -> ctypes.CDLL:
    source = Path(__file__).with_name(f"{library.name}.cpp")
    parts = (source.read_bytes(), *(text.encode() for text in (shlex.join(command), version, _processor())))
    name = f"{library.name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}"
    try:
        place = kept.folder()
    except OSError as error:
        _tell("cache", f"{source.name} is compiled for this process alone, since it cannot be kept: {error}")
        return _make(library, [*command, str(source)])
    found = kept.find(place, name)
    if found is not None:
        with contextlib.suppress(_BuildError):  # made where the system's own libraries are others: made again
            return _load(library, found)
    with kept.locked(place, _SECONDS):
        again = kept.find(place, name)
        if again not in (None, found):  # another process has made it meanwhile
            return _load(library, again)
        return _make(library, [*command, str(source)], lambda made: kept.keep(place, name, made))


def _make(library: Library, command: Sequence[str], keep: Callable[[Path], None] | None = None) -> ctypes.CDLL:
    """Compile, load and try; what is kept is what was right."""
    if _given_up:
        raise _BuildError(_given_up[0])
    with tempfile.TemporaryDirectory(prefix="randbatch-") as place:  # a loaded library needs its file no more
        made = Path(place, f"{library.name}.so")
        _run([*command, "-o", str(made)], _SECONDS)
        if not made.is_file():
            raise _BuildError(f"`{shlex.join(command)}` ended well, but wrote nothing")
        loaded = _load(library, made)
        if keep is not None:
            try:
                keep(made)
            except (OSError, UserError) as error:
                _tell("cache", f"{library.name}.cpp is compiled for this process alone, it cannot be kept: {error}")
        return loaded


def _load(library: Library, path: Path) -> ctypes.CDLL:
    """Load a library, and try it."""
    has_denormals = _has_denormals()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise _BuildError(f"what the compiler made cannot be loaded: {_shown(str(error))}") from error
    if has_denormals and not _has_denormals():
        torch.set_flush_denormal(False)  # for the whole process, by a few instructions that -ffast-math links in
        raise _BuildError("what the compiler made switches off numbers below the smallest normal one (-ffast-math)")
    wrong = library.check(loaded)
    if wrong is not None:
        raise _BuildError(f"what the compiler made failed its first trial: {_shown(wrong)}")
    return loaded


def _has_denormals() -> bool:
    return sys.float_info.min / float(len(_FLAGS)) > 0


def _compiler() -> list[str]:
    """The command of the C++ compiler; empty if there is none."""
    try:
        words = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise _BuildError(f"$CXX is no command: {error} in {_shown(os.environ['CXX'])!r}") from error
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return words or ([] if found is None else [found])


@cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"], _SECONDS_TO_ANSWER)


def _processor() -> str:
    """What decides which instructions there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _run(command: Sequence[str], seconds: float) -> str:
    """What a command says. Neither it nor what it has started outlives its time."""
    shown = f"`{_shown(shlex.join(command))}`"
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=os.environ | {"LC_ALL": "C"},  # messages in English
                start_new_session=True,  # all of it can be ended at once
            )
        except (OSError, ValueError) as error:
            raise _BuildError(f"{shown} cannot be run: {error}") from error
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise _BuildError(f"{shown} did not end in {seconds:g} s") from error
        finally:
            if process.returncode is None:  # an interruption too
                with contextlib.suppress(OSError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        text = said.read(2**20).decode(errors="replace")
    if code:
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line]
        raise _BuildError(f"{shown} failed with code {code}: {_shown((errors or lines or ['not a word'])[0])}")
    return text


def _shown(text: str) -> str:
    """So much of a text as a message can hold."""
    plain = "".join(char if char.isprintable() else " " for char in text)
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]} …"
