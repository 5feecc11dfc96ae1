"""Several runs, one table, one picture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from randbatch._files import read_json, write_json, write_text
from randbatch.train.config import RunConfig, SweepConfig, sweep_from_json, to_json
from randbatch.train.data import load_dataset
from randbatch.train.loop import read_log, read_result, train_run
from randbatch.train.machine import pick_device
from randbatch.train.report import draw_curves, table

__all__ = ["Interrupted", "load_sweep", "train_sweep"]

SWEEP = "sweep.json"


class Interrupted(KeyboardInterrupt):
    """A command was interrupted, and can go on: `how` says how."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


def train_sweep(config: SweepConfig, *, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Train every run of `config`, print the table, draw the picture; return the results.

    Raises:
        ValueError, FileNotFoundError: the data set, a setting or a checkpoint is not what it should be.
        Interrupted: by Ctrl-C; every finished epoch is on the disk.
    """
    folder = _open_folder(config)
    runs = list(config.runs())
    folders = [folder if len(runs) == 1 else folder / run_name(run) for run in runs]
    load = functools.lru_cache(maxsize=1)(load_dataset)
    pick_device(config.device)
    for split in config.split:  # what is wrong with the device or the data set shows before a folder is made
        load(config.dataset, config.root, split)
    write_json(folder / SWEEP, to_json(replace(config, out=None, resume=None)))
    results: list[dict[str, Any]] = []
    say(f"results go to {folder}")
    try:
        for run, place in zip(runs, folders, strict=True):
            result = read_result(place)
            if result is None or result["epochs"] < run.epochs:
                result = train_run(run, load(run.dataset, run.root, run.split), place, label=run_name(run))
            draw_curves([(result, read_log(place))], place / "curves.png")
            results.append(result)
    except KeyboardInterrupt:
        raise Interrupted(f"randbatch train --resume {folder}") from None
    text = table(results)
    write_text(folder / "table.md", text + "\n")
    draw_curves([(r, read_log(place)) for r, place in zip(results, folders, strict=True)], folder / "curves.png")
    say(f"\n{text}\n\ntable: {folder / 'table.md'}\npicture: {folder / 'curves.png'}")
    return results


def run_name(run: RunConfig) -> str:
    """The folder of a run in its sweep."""
    return f"{run.attention}-split{run.split}-seed{run.seed}"


def load_sweep(folder: Path) -> SweepConfig:
    """The settings of the sweep in `folder`, ready to be resumed.

    Raises:
        FileNotFoundError: the folder holds no sweep.
        ValueError: its settings cannot be read.
    """
    path = folder / SWEEP
    if not path.exists():
        raise FileNotFoundError(f"resume: {folder} holds no run ({SWEEP} is missing)")
    return replace(sweep_from_json(read_json(path)), resume=folder)


def _open_folder(config: SweepConfig) -> Path:
    """The folder of the results; a new sweep does not go into the folder of another."""
    if config.resume is not None:
        return config.resume
    folder = config.out or Path("runs") / f"{Path(config.dataset).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    if (folder / SWEEP).exists():
        raise ValueError(f"out: {folder} already holds a run; go on with --resume {folder}, or choose another --out")
    return folder
