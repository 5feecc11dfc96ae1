"""Folders of results that can be gone on with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from randbatch._errors import Interrupted, InvalidValue
from randbatch._files import json_text, make_folder, parse_json, read_record, write_record
from randbatch._folders import check_names, check_new, locked, remove_stale, terminate_as_interrupt

__all__ = ["open_folder"]

SETTINGS = "settings.json"


@contextmanager
def open_folder(
    folder: Path | None, name: str, settings: Mapping[str, Any], say: Callable[[str], None], remark: str = ""
) -> Generator[Path]:
    """The folder of a command's results: a new or an empty one, or one that was made with the same settings.

    It is locked until the block ends. All its files can be read and replaced: none is a device, a FIFO or a link.

    Args:
        folder: where. Default: `runs/<name>-<time>`.
        name: of the command and what it is about.
        settings: all that the results depend on, to be written beside them.
        say: told where results go.
        remark: what else is to be known of going on after an interruption.

    Raises:
        InvalidValue: the folder holds results of other settings, or something else; or another process writes there.
        Interrupted: by Ctrl-C or SIGTERM inside the block.
    """
    place = folder or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    plain = parse_json(json_text(settings), SETTINGS)
    _check(place, plain)
    make_folder(place)
    with terminate_as_interrupt(), locked(place):
        _check(place, plain)  # again: somebody else may have been faster
        write_record(place / SETTINGS, plain)
        remove_stale(place)
        say(f"results go to {place}")
        try:
            yield place
        except KeyboardInterrupt:
            raise Interrupted(f"the same command and --out {shlex.quote(str(place))}{remark}") from None


def _check(place: Path, settings: Mapping[str, Any]) -> None:
    check_names(place)
    if not (place / SETTINGS).exists():
        check_new(place)
        return
    stored = read_record(place / SETTINGS)
    for key in sorted(stored.keys() | settings.keys()):
        if stored.get(key) != settings.get(key):
            raise InvalidValue(
                f"out: {place} was made with {key} = {stored.get(key)}, it cannot go on with {settings.get(key)}"
            )
