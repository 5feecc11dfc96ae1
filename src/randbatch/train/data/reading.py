"""Reading the files of other libraries: what is damaged is one sentence, and nothing blocks."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator
from pathlib import Path

from randbatch._errors import InvalidValue, MissingFile, UserError

__all__ = ["check_regular_files", "reading"]


@contextlib.contextmanager
def reading(name: str, folder: Path) -> Generator[None]:
    """Whatever a loader of another library raises inside is one sentence that names the folder.

    Such loaders meet a damaged file with any exception at all: of pickle, of zip, of an attribute that is not there.

    Raises:
        MissingFile: files are not there, and were not downloaded.
        InvalidValue: they cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, SystemExit) as error:  # ogb asks before a large download, and exits on a no
        raise MissingFile(
            f"data set {name!r} is not whole under {folder} and could not be downloaded: {_line(error)}"
        ) from error
    except Exception as error:
        raise InvalidValue(
            f"data set {name!r} under {folder} cannot be read ({type(error).__name__}: {_line(error)}); "
            "remove its files to have them downloaded again"
        ) from error


def _line(error: BaseException) -> str:
    """The first line, and not all of a long one."""
    return str(error).strip().partition("\n")[0][:200]


def check_regular_files(folder: Path, stem: str) -> None:
    """Check that a loader will find files and folders only under those of `folder` that are called `stem`.

    Libraries write `Cora_ML`, `cora-ml` and `cora_ml`; all are looked at. A FIFO would block the loader for ever.

    Raises:
        InvalidValue: there is a device, a FIFO or a socket.
    """
    wanted = _plain(stem)
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _plain(place.name) != wanted:
            continue
        for parent, _, names in os.walk(place):
            for path in (Path(parent) / name for name in names):
                if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                    raise InvalidValue(f"{path} must be a regular file: it is part of a data set")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
