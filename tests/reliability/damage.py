"""Damage to files and folders, and what a command makes of it: what is right, or one line and a folder as it was."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from randbatch._errors import UserError

LIMIT = 30  # seconds until something that waits for ever is given up


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in a folder: kinds, permissions, contents, where links lead."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content: Any = None
        if stat.S_ISREG(mode):
            size = path.lstat().st_size
            content = path.read_bytes() if size < 2**28 else size
        elif stat.S_ISLNK(mode):
            content = str(path.readlink())
        found[str(path.relative_to(folder))] = (mode, content)
    return found


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A `TimeoutError` where something would wait for ever."""

    def stop(*_: object) -> None:
        raise RuntimeError(f"nothing happened for {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def line_of(call: Callable[[], Any], folder: Path) -> str | None:
    """The line that a command would print of a failure, None if there was none.

    A failure is a `UserError` or an `OSError`, in one line, and leaves `folder` as it was; anything else fails the
    test.
    """
    before = snapshot(folder)
    try:
        with at_most(LIMIT):
            call()
    except (UserError, OSError) as error:
        text = str(error)
        assert text and "\n" not in text.strip(), f"not one line: {text!r}"
        assert len(text) < 1000, f"too long a line: {text!r}"
        assert snapshot(folder) == before, f"the folder was changed before: {text}"
        return text
    return None


# Damage


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(1, len(content)))])


def cut_last_byte(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(1000))


def huge(path: Path, rng: random.Random) -> None:
    """Sixty-four gigabytes of zeros that take no space."""
    with path.open("r+b") as file:
        file.truncate(2**36)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, rng: random.Random) -> None:
    """Exchanged with another file of the folder."""
    other = rng.choice(sorted(p for p in path.parent.iterdir() if p != path and p.is_file()))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def fifo(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, rng: random.Random) -> None:
    """A symbolic link to the same content elsewhere, which must not be written through."""
    place = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(place)
    path.symlink_to(place)


def dangling(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def loop(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    **{f"flip {number}": flip for number in range(6)},
    **{f"truncate {number}": truncate for number in range(2)},
    **{
        one.__name__: one
        for one in (cut_last_byte, empty, noise, huge, remove, swap, fifo, link, dangling, loop, folder)
    },
}


# Processes with less power


def in_child(call: Callable[[], Any]) -> str:
    """What `call` returns or raises in a forked process that has no power over permissions, as text."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            _give_up_power()
            try:
                text = f"right: {call()}"
            except (UserError, OSError) as error:
                text = f"line: {error}"
            os.write(write, text.encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        text = file.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "something else than one line"
    return text


def _give_up_power() -> None:
    """Root may read and write anything by two capabilities; without them permissions hold for root too."""
    if os.geteuid():
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, of the effective set
    assert libc.capset(header, sets) == 0
