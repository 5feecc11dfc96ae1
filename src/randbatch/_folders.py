"""Result folders: what may go into them, who writes there, and what resumes.

A result folder holds a record of the settings that its results were made with. The same settings resume it; others are
refused by `check_settings`, the one resume check of the package.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from randbatch._errors import Interrupted, InvalidValue, MissingFile
from randbatch._files import (
    check_replaceable,
    is_stale,
    json_text,
    make_folder,
    open_regular,
    parse_json,
    read_record,
    write_record,
)

__all__ = [
    "check_names",
    "check_new",
    "check_settings",
    "first_difference",
    "locked",
    "new_place",
    "open_folder",
    "read_settings",
    "remove_stale",
    "terminate_as_interrupt",
]

SETTINGS = "settings.json"
_LOCK = ".randbatch-lock"
_SHOWN = 100  # characters of a value in a message
_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


# The folder of a command


def new_place(name: str) -> Path:
    """Where results go by default: `runs/<name>-<time>`."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


@contextlib.contextmanager
def open_folder(
    place: Path,
    settings: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    how: str | None = None,
    record: str = SETTINGS,
    names: Iterable[str] | None = None,
    free: Collection[str] = (),
    resume: bool | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Generator[None]:
    """Open a folder for results: a new one, an empty one, or one that was made with the same settings.

    Everything is checked before anything is written. The folder is locked until the block ends.

    Args:
        place: of the folder.
        settings: all that the results depend on; they are written into the folder.
        say: is told where the results go.
        how: the way to resume after an interruption. Default: the same command with this folder as `--out`.
        record: name of the file of the settings.
        names: files that must be readable and replaceable. Default: all that the folder holds.
        free: settings that a resumed folder may change.
        resume: True: the folder must be one to resume. False: it must not be. Default: None, both are taken.
        ready: further checks, made before anything is written, under the lock of a folder that exists.

    Raises:
        MissingFile: there is nothing to resume.
        InvalidValue: the folder holds results of other settings, or something else; or another process writes there.
        Interrupted: by Ctrl-C or SIGTERM, once the folder can be resumed.
    """
    plain = parse_json(json_text(settings), record)
    names = None if names is None else tuple(names)

    def check() -> None:
        if place.is_dir():
            check_names(place, names)
        _check_resume(place, plain, record, free, resume)

    with terminate_as_interrupt():
        try:
            with contextlib.ExitStack() as stack:
                check()
                exists = place.is_dir()
                if exists:
                    stack.enter_context(locked(place))
                ready()
                if not exists:
                    make_folder(place)
                    stack.enter_context(locked(place))
                check()  # again: another process may have been faster
                write_record(place / record, plain)
                remove_stale(place)
                say(f"results go to {place}")
                yield
        except KeyboardInterrupt:
            if not (place / record).exists():  # nothing was written
                raise
            raise Interrupted(how or f"the same command and --out {shlex.quote(str(place))}") from None


def _check_resume(
    place: Path, settings: Mapping[str, Any], record: str, free: Collection[str], resume: bool | None
) -> None:
    if resume or (place / record).exists():
        if resume is False:
            again = f"--resume {shlex.quote(str(place))}"
            raise InvalidValue(f"out: {place} already holds a run; resume it with {again}, or choose another --out")
        check_settings(place, read_settings(place, record), settings, free)
    else:
        check_new(place)


def read_settings(place: Path, record: str) -> dict[str, Any]:
    """The settings that a folder was made with.

    Raises:
        MissingFile: the folder holds no such record.
        InvalidValue: the record was changed, or is none.
    """
    check_replaceable(place / record)
    if not (place / record).exists():
        raise MissingFile(f"resume: {place} holds no run ({record} is missing)")
    return read_record(place / record)


def check_settings(
    source: Path, stored: Mapping[str, Any], given: Mapping[str, Any], free: Collection[str] = ()
) -> None:
    """The resume check: results resume with the settings that they were made with.

    Args:
        source: what the stored settings belong to.
        stored: settings as JSON values; one that is absent is None.
        given: the settings of now, likewise.
        free: settings that may change.

    Raises:
        InvalidValue: a setting differs; the message names it and both values.
    """
    found = first_difference(
        *({name: value for name, value in settings.items() if name not in free} for settings in (stored, given))
    )
    if found is not None:
        name, there, here = found
        raise InvalidValue(f"{name}: {source} was made with {there}, got {here}; other settings need another folder")


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first name whose values differ, and both values as text; names that both have come first."""
    names = sorted(one.keys() | other.keys(), key=lambda name: (name not in one or name not in other, name))
    for name in names:
        if one.get(name) != other.get(name):
            return name, _shown(one.get(name)), _shown(other.get(name))
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# What a folder holds


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
    """Check that files of a folder can be read and replaced, before anything is written.

    Args:
        folder: one that exists, or not yet.
        names: of the files. Default: all that the folder holds.

    Raises:
        InvalidValue: one is a device, a FIFO, a folder or a symbolic link.
    """
    if names is None:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ()
    for name in names:
        check_replaceable(folder / name)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files of a process that was killed. The caller must hold the lock of the folder."""
    for path in folder.iterdir():
        if is_stale(path):
            path.unlink(missing_ok=True)


# Who writes there


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Keep other processes from writing into `folder`; the end of the process, however it comes, ends the lock.

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
    """Inside, SIGTERM, by which a scheduler ends a job, is Ctrl-C: the work stops where it can resume."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    if before is not signal.SIG_DFL:  # another thread, or the caller has its own handler
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
