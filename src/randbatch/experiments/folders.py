"""Folders of results that can be gone on with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from randbatch._files import read_json, write_json
from randbatch.train.sweep import Interrupted

__all__ = ["open_folder"]

SETTINGS = "settings.json"


@contextmanager
def open_folder(
    folder: Path | None, name: str, settings: Mapping[str, Any], say: Callable[[str], None], remark: str = ""
) -> Generator[Path]:
    """The folder of a command's results; one that is there already must have been made with the same settings.

    Args:
        folder: where. Default: `runs/<name>-<time>`.
        name: of the command and what it is about.
        settings: all that the results depend on, to be written beside them.
        say: told where results go.
        remark: what else is to be known of going on after an interruption.

    Raises:
        ValueError: the folder holds results of other settings.
        Interrupted: by Ctrl-C inside the block.
    """
    place = folder or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    path = place / SETTINGS
    if path.exists():
        stored = read_json(path)
        for key, value in settings.items():
            if stored.get(key) != value:
                raise ValueError(f"out: {place} was made with {key} = {stored.get(key)}, it cannot go on with {value}")
    else:
        write_json(path, dict(settings))
    say(f"results go to {place}")
    try:
        yield place
    except KeyboardInterrupt:
        raise Interrupted(f"the same command and --out {place}{remark}") from None
