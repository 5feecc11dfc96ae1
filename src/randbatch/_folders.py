"""Folders of results: whose they are, and who writes into them now."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import threading
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from randbatch._errors import InvalidValue
from randbatch._files import check_replaceable, is_stale, open_regular

__all__ = ["check_names", "check_new", "locked", "remove_stale", "terminate_as_interrupt"]

_LOCK = ".randbatch-lock"
_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


def check_new(folder: Path, beside: Iterable[str] = ()) -> None:
    """Check that results may go here: there is no such folder, or it is empty but for what a killed process left.

    Args:
        folder: where they would go.
        beside: names that may be there.

    Raises:
        InvalidValue: it holds something, or is no folder.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InvalidValue(f"out: {there} is no folder")
    if there != folder:
        return
    known = {_LOCK, *beside}
    names = sorted(path.name for path in folder.iterdir() if path.name not in known and not is_stale(path))
    if names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise InvalidValue(f"out: {folder} already holds {some}; choose a new or an empty folder")


def check_names(folder: Path, names: Iterable[str] | None = None) -> None:
    """Check that what is called so in a folder can be read and replaced, before anything is written.

    Args:
        folder: one that is there, or not yet.
        names: files. Default: all that the folder holds.

    Raises:
        InvalidValue: a device, a FIFO, a folder, a symbolic link.
    """
    if names is None:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ()
    for name in names:
        check_replaceable(folder / name)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files of a process that was killed. Only who holds the lock of the folder may do it."""
    for path in folder.iterdir():
        if is_stale(path):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Nobody else writes into `folder` meanwhile; the end of the process, however it comes, ends the lock.

    The lock is on the folder itself, which takes no file. Where folders cannot be locked (some network file systems,
    Windows), it is a file that names its process.

    Raises:
        InvalidValue: another process holds it.
    """
    handle = _lock_folder(folder)
    own = handle is None and _make_lock_file(folder / _LOCK)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if own:
            (folder / _LOCK).unlink(missing_ok=True)


def _lock_folder(folder: Path) -> int | None:
    """The handle that holds the lock, None where folders cannot be locked."""
    if _fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fcntl.flock(handle, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InvalidValue(f"{folder} is being written by another process; wait for it, or end it") from None
    except OSError:  # the file system has no such lock
        os.close(handle)
        return None
    return handle


def _make_lock_file(path: Path) -> bool:
    """Whether the lock file was made; a folder that cannot be written needs none."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:  # whether its process still lives cannot be told from another machine
        with open_regular(path) as file:
            holder = file.read(1000).decode(errors="replace").strip()
        raise InvalidValue(
            f"{path.parent} is being written by another process ({holder}); if that one is gone, remove {path}"
        ) from None
    except OSError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    return True


@contextlib.contextmanager
def terminate_as_interrupt() -> Generator[None]:
    """SIGTERM, by which a scheduler ends a job, is Ctrl-C inside: the work stops where it can go on."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    if before is not signal.SIG_DFL:  # another thread, or somebody has a use of their own for it
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
