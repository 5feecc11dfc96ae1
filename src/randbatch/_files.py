"""Files that are whole or not there.

- A file is written beside its place, synced, then moved there: an interruption leaves the old one.
- Only a regular file is read or replaced. A device, a FIFO, a socket, a folder is refused, and so is a symbolic link,
  which would lead elsewhere; `links=True` allows one for what is only read. Folders may be reached by links.
- JSON is valid JSON: a number that is not finite is written as null, and is refused where it is read.
- A record is a JSON object with its own checksum: it is read as it was written, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from randbatch._errors import InvalidValue, MissingFile

__all__ = [
    "append_text",
    "check_replaceable",
    "is_stale",
    "json_text",
    "make_folder",
    "naming",
    "open_regular",
    "parse_json",
    "read_json",
    "read_record",
    "read_text",
    "write_bytes",
    "write_json",
    "write_picture",
    "write_record",
    "write_text",
]

_BINARY, _NOFOLLOW, _NONBLOCK = (getattr(os, name, 0) for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"))
_TEMPORARY = re.compile(r"\.randbatch-[0-9a-f]{16}")
_SUM = "sha256"
_MOST_TEXT = 2**28  # bytes of a text file; no file of ours comes near
_KINDS = {
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFSOCK: "a socket",
}


# Reading


def open_regular(path: Path, *, links: bool = False) -> BinaryIO:
    """Open a regular file to read it; nothing else is opened, so that nothing can block.

    Args:
        path: of the file.
        links: whether a symbolic link to such a file is followed. Default: it is refused.

    Raises:
        MissingFile: there is no such file.
        InvalidValue: it is something else.
        OSError: it cannot be opened.
    """
    found = _mode(path, links=links)
    if found is None:
        raise MissingFile(f"{path} does not exist")
    _refuse_other(path, found)
    handle = os.open(path, os.O_RDONLY | _BINARY | _NONBLOCK | (0 if links else _NOFOLLOW))
    return os.fdopen(handle, "rb")


def read_text(path: Path) -> str:
    """Read a text; an `InvalidValue` names the file that is none."""
    with open_regular(path) as file, naming(path):
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_TEXT:
            raise InvalidValue(f"{path} must be a text of at most {_MOST_TEXT} bytes, it has {size}")
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise InvalidValue(f"{path} is not a text: {error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON document; an `InvalidValue` names the file that is not one."""
    return parse_json(read_text(path), path)


def parse_json(text: str, source: Path | str) -> Any:
    """Parse a JSON document; an `InvalidValue` names the source that is not one. Its numbers are finite."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{source} is not valid JSON: {error}") from error


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote; an `InvalidValue` names the file that was changed since, or is no record."""
    content = read_json(path)
    if not isinstance(content, dict) or _SUM not in content:
        raise InvalidValue(f"{path} is no record of randbatch: it holds no {_SUM}")
    found = content.pop(_SUM)
    if found != _checksum(content):
        raise InvalidValue(f"{path} was changed since it was written: its {_SUM} is another one")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


# Writing


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; an interruption leaves the old file. The umask says who may read it.

    Raises:
        InvalidValue: there is something else than a regular file.
        OSError: it cannot be written; the old file stays.
    """
    make_folder(path.parent)
    check_replaceable(path)
    temporary = path.with_name(f".randbatch-{secrets.token_hex(8)}")
    with naming(path):
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """Replace `path` by a text in one step; a file that holds it already is left alone."""
    _update(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by a JSON document in one step; a number that is not finite becomes null."""
    write_text(path, f"{json_text(content, indent=2)}\n")


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by a JSON object and its checksum in one step."""
    plain = json.loads(json_text(content))
    write_json(path, plain | {_SUM: _checksum(plain)})


def write_picture(path: Path, figure: Any) -> None:
    """Replace `path` by a PNG of a matplotlib figure in one step."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    _update(path, content.getvalue())


def append_text(path: Path, content: str) -> None:
    """Add to a regular file that is there, and wait until it is on the disk."""
    with naming(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | _BINARY | _NONBLOCK | _NOFOLLOW)
        with os.fdopen(handle, "ab") as file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON of `content`, in which a number that is not finite is null."""
    return json.dumps(_without_holes(content), indent=indent, allow_nan=False)


def _without_holes(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _without_holes(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        return [_without_holes(value) for value in content]
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _update(path: Path, content: bytes) -> None:
    """Write unless the file holds `content` already: a finished folder may be one that cannot be written."""
    check_replaceable(path)
    if path.exists():
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size == len(content) and file.read() == content:
                return
    write_bytes(path, content)


# Places


def check_replaceable(path: Path) -> None:
    """Check that nothing is there, or a regular file.

    Raises:
        InvalidValue: there is something else.
    """
    found = _mode(path, links=False)
    if found is not None:
        _refuse_other(path, found)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they outlast a power cut; one that is there is left alone."""
    found = _mode(path, links=True)
    if found is None:
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)
    elif not stat.S_ISDIR(found):
        raise InvalidValue(f"{path} must be a folder, it is {_KINDS.get(stat.S_IFMT(found), 'a file')}")


def is_stale(path: Path) -> bool:
    """Whether this is a temporary file of `write_bytes`; without a writer it was left by a process that was killed."""
    return _TEMPORARY.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


@contextlib.contextmanager
def naming(path: Path) -> Generator[None]:
    """An `OSError` inside names `path`: not every one does, and a temporary file's name says nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _mode(path: Path, *, links: bool) -> int | None:
    """The kind of what is at `path`, None if there is nothing."""
    try:
        return path.stat(follow_symlinks=links).st_mode
    except FileNotFoundError:
        return None
    except ValueError as error:  # a null byte, a lone surrogate
        raise InvalidValue(f"{str(path)!r} is no path: {error}") from error


def _refuse_other(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise InvalidValue(f"{path} must be a regular file, it is {_KINDS.get(stat.S_IFMT(mode), 'something else')}")


def _sync_folder(path: Path) -> None:
    """Put names on the disk, where folders can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with naming(path):
                os.fsync(handle)
        finally:
            os.close(handle)
