"""Compiled libraries of this user, kept from one process to the next.

The folder is `$XDG_CACHE_HOME/randbatch`, by default `~/.cache/randbatch`; a relative `$XDG_CACHE_HOME` counts for
nothing, as its specification says. What lies there is run. So nothing is taken that somebody else could have put or
changed there: folder and file must be this user's, and nobody else may write to them; links that lead to the folder
are followed, links inside are not. Nor is anything taken that is not whole: a file's name ends with the SHA-256 of its
content, and a library with a missing end would end every process that runs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Generator
from pathlib import Path

from randbatch._files import is_stale, write_bytes

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is compiled there
    fcntl = None

__all__ = ["find", "folder", "keep", "locked"]

_NOT_A_FILE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # links and pipes are not waited for
_MOST = 2**26  # bytes of a library; ours have about 2^17
_PAUSE = 0.05  # seconds between two looks at a lock


def folder() -> Path:
    """The folder, made if it is not there.

    Raises:
        OSError: there can be none, or others may write to it; the message says which and what to do.
    """
    path = _place()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except (OSError, ValueError) as error:
        raise OSError(f"{path} cannot be made ({error}); $XDG_CACHE_HOME may name another place") from error
    if found.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to another user (number {found.st_uid}); $XDG_CACHE_HOME may name another place")
    if found.st_mode & 0o022:
        raise OSError(f"others may write to {path}; forbid it (chmod go-w), having looked at what lies there")
    return path.resolve()


def _place() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    if Path(named).is_absolute():
        return Path(named, "randbatch")
    if not Path(os.environ.get("HOME", "/")).is_absolute():
        raise OSError(f"$HOME is no absolute path ({os.environ['HOME']!r}); $XDG_CACHE_HOME may name a place")
    try:
        return Path.home() / ".cache" / "randbatch"
    except (RuntimeError, KeyError) as error:
        raise OSError("this user has no home; $XDG_CACHE_HOME may name a place") from error


def find(place: Path, name: str) -> Path | None:
    """The library that was kept as `name`, whole and this user's own; one that is not is removed."""
    for path in sorted(place.glob(f"{name}-*.so")):
        if _is_sound(path):
            return path
        with contextlib.suppress(OSError):  # if it cannot be removed, it stays, and is not taken
            path.unlink()
    return None


def _is_sound(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | _NOT_A_FILE)
    except OSError:
        return False
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return False
        return found.st_size <= _MOST and path.stem.endswith(f"-{_digest(file.read())}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def keep(place: Path, name: str, made: Path) -> None:
    """Keep the library `made` as `name`; it is on the disk, whole, or not there.

    Raises:
        OSError: it cannot be written.
    """
    content = made.read_bytes()
    path = place / f"{name}-{_digest(content)}.so"
    write_bytes(path, content)
    path.chmod(0o600)  # whatever the umask is


@contextlib.contextmanager
def locked(place: Path, seconds: float) -> Generator[None]:
    """One process at a time; after so many seconds without the lock it goes on without, which costs time only."""
    try:
        handle = os.open(place / "lock", os.O_RDWR | os.O_CREAT | _NOT_A_FILE, 0o600)
    except OSError:  # nothing can be written, so nothing is kept either
        yield
        return
    try:
        if _lock(handle, time.monotonic() + seconds):
            for path in filter(is_stale, place.iterdir()):  # left by a process that was killed
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, until: float) -> bool:
    if fcntl is None:
        return False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
        except OSError:  # a file system without locks
            return False
        time.sleep(_PAUSE)
