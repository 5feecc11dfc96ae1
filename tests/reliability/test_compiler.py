"""Compilers that fail in every way.

Whatever happens, a call gives the right numbers: by the compiled kernel, or by torch's own functions after one warning
that says why.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import faking
import pytest
import torch
from faking import PROBLEM, STUBS, Place, build_command, call, ended_well, in_child

import randbatch as rb
from randbatch.kernels import BACKENDS
from randbatch.kernels.cpu import build, ops

pytestmark = faking.NEEDS_COMPILER
made, place = faking.made, faking.place

# Compilers

HANG = 'sleep 1000 & echo $! > {root}/pid; trap "" TERM INT; wait'
SCRIPTS = {  # the body of the script, what it says to --version, what the reason holds
    "fails": ("exit 3", "echo 1", "code 3"),
    "fails with a word": ("echo 'x.cpp:1: error: no luck' >&2; exit 1", "echo 1", "error: no luck"),
    "fails in another tongue": (r"printf '\377\376\n\033[31m'; exit 1", "echo 1", "code 1"),
    "says very much": ("yes error | head -c 3000000; exit 1", "echo 1", "code 1: error"),
    "dies": ("kill -SEGV $$", "echo 1", "code -11"),
    "does not know its version": ("exit 0", "exit 1", "--version` failed"),
    "does not answer": ("exit 0", "sleep 1000", "did not end"),
    "hangs": (HANG, "echo 1", "did not end"),
    "writes nothing": ("exit 0", "echo 1", "wrote nothing"),
    "makes a folder": ('mkdir "$out"', "echo 1", "wrote nothing"),
    "writes an empty file": (': > "$out"', "echo 1", "cannot be loaded"),
    "writes a text": ('echo hello > "$out"', "echo 1", "cannot be loaded"),
    "writes half a header": ('head -c 40 {right} > "$out"', "echo 1", "cannot be loaded"),
    "reads what is typed": ("cat; exit 1", "echo 1", "code 1"),
    "makes an empty library": ("{nothing}", "echo 1", "attend_forward"),
    "computes nothing": ("{idle}", "echo 1", "first trial"),
    "is always out of memory": ("{failing}", "echo 1", "MemoryError"),
    "ignores our options: fast math": ('exec {compiler} "$@" -ffast-math', "echo 1", "what the compiler made"),
    "ignores our options: finite": ('exec {compiler} "$@" -ffinite-math-only', "echo 1", "first trial"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_compiler_that(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    body, version, reason = SCRIPTS[name]
    for key in STUBS:
        body = body.replace(f"{{{key}}}", place.copy(key))
    (compiler,) = build_command()
    for key, text in (("root", place.root), ("right", place.made["right"]), ("compiler", compiler)):
        body = body.replace(f"{{{key}}}", str(text))
    place.script(body, version)
    if reason == "did not end":
        monkeypatch.setattr(build, "_SECONDS", 0.3)
        monkeypatch.setattr(build, "_SECONDS_TO_ANSWER", 0.3)
    if "ignores" in name:
        monkeypatch.setattr(build, "_SECONDS", 120.0)
    assert_refused(place, reason)
    if name == "hangs":
        assert_ended(int((place.root / "pid").read_text()))


def assert_refused(place: Place, reason: str) -> None:
    """One warning in a process, for all sizes of heads and all sources; and the backend says why not."""
    assert not call(place)
    assert not call(place, size=32)
    layer = rb.nn.RandomBatchAttention(32, 2, 5)
    layer(torch.randn(20, 32)).sum().backward()
    (text,) = place.warned
    assert reason in text and "torch's own functions are taken instead" in text and len(text) < 1000, text
    assert "\n" not in text
    assert reason in str(BACKENDS["cpu"].why_not(PROBLEM))
    assert place.compiled <= 1, "it was asked again"
    assert not place.kept()


def assert_ended(pid: int) -> None:
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.02)
    pytest.fail("a child of the compiler is still there")


COMMANDS = {
    "g++ 'x": "$CXX is no command",
    "/does/not/exist": "cannot be run",
    "/tmp": "cannot be run",
    "/etc/passwd": "cannot be run",
    "false": "failed with code 1",
    "true": "wrote nothing",
    "'' --help": "cannot be run",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_named_as_a_compiler_and_is_none(command: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    assert_refused(place, COMMANDS[command])


@pytest.mark.parametrize("command", ["", "  "])
def test_no_compiler_is_no_failure(command: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    monkeypatch.setenv("PATH", str(place.root))
    assert not call(place)
    assert not place.warned
    assert "it needs a C++ compiler" in str(BACKENDS["cpu"].why_not(PROBLEM))


def test_options_in_the_name_of_the_compiler_do_no_harm(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (compiler,) = build_command()
    monkeypatch.setenv("CXX", f"{compiler} -Ofast -ffast-math -fvisibility=hidden -fsanitize=address")
    monkeypatch.setattr(build, "_SECONDS", 120.0)
    assert call(place)
    assert not place.warned


def test_a_windows_without_posix(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.modules['fcntl'] = None; import randbatch.kernels.cpu.cache as c; assert c.fcntl is None"
    subprocess.run([sys.executable, "-c", script], check=True)
    monkeypatch.setattr(build.os, "name", "nt")
    assert "Linux and other POSIX systems" in str(ops.library_for(16, 16).why_not())


# Processes

FORK = """
import os, signal, torch, randbatch as rb
torch.set_num_threads(2)
inputs = [torch.randn(2000, 2, 16) for _ in range(3)]
run = lambda: rb.random_batch_attention(*inputs, batch_size=50, seed=1, backend="cpu")
want = run()
pid = os.fork()
if not pid:
    signal.alarm(20)
    torch.set_num_threads(1)  # GNU's OpenMP has no other threads after a fork: torch's own functions wait for ever too
    os._exit(0 if torch.equal(run(), want) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_after_a_fork_with_one_thread() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize("back", [False, True])
def test_too_little_memory_is_an_error_and_not_the_end(back: bool, place: Place) -> None:
    """Rows of 128 MB each, which the scratch of a thread holds too, and room for the results alone."""
    num_tokens = 2**21
    part = rb.Partition(torch.arange(num_tokens), ((1, num_tokens),), in_order=True)
    x, lse = torch.zeros(num_tokens, 1, 16), torch.zeros(num_tokens, 1)
    grads = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    assert call(place)

    def work() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + 200 * 2**20,) * 2)
        with pytest.raises(MemoryError, match="scratch"):
            if back:
                BACKENDS["cpu"].backward(x, x, x, x, x, lse, part, PROBLEM, grads)
            else:
                BACKENDS["cpu"].forward(x, x, x, part, PROBLEM)

    assert ended_well(in_child(work))
