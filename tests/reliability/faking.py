"""A process that has just begun, with a home, a cache and a compiler that is a shell script.

The script copies libraries that were made once, so that a case takes a moment. The fixtures are `made` and `place`.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import randbatch as rb
from randbatch.kernels import BACKENDS, Problem
from randbatch.kernels.cpu import build

PROBLEM = Problem(torch.device("cpu"), torch.float32, 16, 16, 0.25, need_lse=True)
NEEDS_COMPILER = pytest.mark.skipif(build._compiler() == [], reason="what is damaged here is made by a C++ compiler")
STUBS = {  # what a compiler may make that is a library, and wrong
    "nothing": "int nothing;",
    "idle": "int attend_forward() { return 0; } int attend_backward() { return 0; }",
    "failing": "int attend_forward() { return 1; } int attend_backward() { return 1; }",
}


@dataclass
class Place:
    """A home, a cache in it, a compiler that is a script, and a count of what it compiled."""

    root: Path
    made: dict[str, Path]
    warned: list[str] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.root / "cache" / "randbatch"

    @property
    def compiled(self) -> int:
        log = self.root / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def script(self, body: str, version: str = "echo 1") -> str:
        """A compiler: `$out` is where its result goes."""
        path = self.root / "compiler"
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *--version*) {version}; exit $?;; esac\n'
            f"echo x >> {self.root}/log\nfor out; do :; done\n{body}\n"
        )
        path.chmod(0o700)
        return str(path)

    def copy(self, name: str) -> str:
        """A command of the script."""
        return f'cp {shlex.quote(str(self.made[name]))} "$out"'

    def kept(self) -> list[Path]:
        return sorted(self.cache.glob("*.so"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Libraries: one that is right, and those that are not."""
    folder = tmp_path_factory.mktemp("made")
    (compiler, *options), source = build._compiler(), Path(build.__file__).with_name("attention.cpp")
    found = {"right": folder / "right.so"}
    command = [compiler, *options, *build._FLAGS, "-DSIZE_D=16", "-DSIZE_E=16", str(source), "-o", str(found["right"])]
    subprocess.run(command, check=True)
    for name, text in STUBS.items():
        found[name] = folder / f"{name}.so"
        options = ["-x", "c++", "-shared", "-fPIC", "-o", str(found[name]), "-"]
        subprocess.run([compiler, *options], input=f'extern "C" {{ {text} }}', text=True, check=True)
    return found


@pytest.fixture
def place(tmp_path: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """As in a process that has just begun."""
    found = Place(tmp_path, made)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", found.script(found.copy("right")))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    for name, value in (("_told", set()), ("_given_up", []), ("_SECONDS", 5.0), ("_SECONDS_TO_ANSWER", 5.0)):
        monkeypatch.setattr(build, name, value)
    begin()
    yield found
    begin()


def begin() -> None:
    """Forget what this process has loaded."""
    for function in (build._build, build._version):
        function.cache_clear()


def call(place: Place, size: int = 16) -> bool:
    """Attend through `auto`, against the formula; whether that was the compiled kernel."""
    part = rb.random_partition(12, 5, seed=1)
    query, key, value = (torch.linspace(-1, 1, 24 * size).mul(k).sin().view(12, 2, size) for k in (3, 5, 7))
    want = torch.empty(12, 2, size, dtype=torch.float64)
    for block in part.split(part.order):
        for tokens in block:
            q, k, v = (x[tokens].transpose(0, 1).double() for x in (query, key, value))
            want[tokens] = ((q @ k.mT / size**0.5).softmax(-1) @ v).transpose(0, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            out = rb.random_batch_attention(query, key, value, partition=part)
            torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    place.warned += [str(one.message) for one in caught]
    assert not list((place.root / "tmp").glob("randbatch-*")), "a temporary folder is left"
    return BACKENDS["cpu"].why_not(PROBLEM) is None


def build_command() -> list[str]:
    """The real compiler, whatever $CXX is now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX")
        return build._compiler()


def in_child(work: Callable[[], object]) -> int:
    """The number of a forked process that ends well if `work` does."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(60)
        work()
        code = 0
    finally:
        os._exit(code)


def ended_well(*pids: int) -> bool:
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]  # all are waited for
    return not any(codes)
