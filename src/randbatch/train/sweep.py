"""Several runs, one table, one picture."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from randbatch._errors import InvalidValue
from randbatch._files import make_folder, write_text
from randbatch._folders import locked, new_place, open_folder, read_settings
from randbatch._optional import require
from randbatch.models import GraphTransformer
from randbatch.train.config import RunConfig, SweepConfig, free_settings, to_json
from randbatch.train.data import Dataset, load_dataset, needs_root
from randbatch.train.folder import CURVES, read_log, read_run
from randbatch.train.loop import Trainer, check_rate, make_model, train_here
from randbatch.train.machine import pick_device
from randbatch.train.report import draw_curves, table
from randbatch.train.stored import from_json, is_own, stored_root

__all__ = ["load_sweep", "train_sweep"]

SWEEP, TABLE = "sweep.json", "table.md"
Load = Callable[[str, Path, int], Dataset]
Places = list[tuple[RunConfig, Path]]


def train_sweep(config: SweepConfig, *, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Train every run of `config`, print the table, draw the picture; return the results.

    Settings, data and the content of the folder are checked before anything is written. A finished sweep that is
    resumed is read and printed; its folder may be read-only.

    Raises:
        UserError, OSError: the data set, a setting, a file or the folder is not what it should be.
        Diverged: the loss of a run is no longer finite.
        Interrupted: by Ctrl-C or SIGTERM; every finished epoch is on the disk.
    """
    for module in ("matplotlib", "numpy", "safetensors.torch", "tqdm"):  # what is missing shows before a folder is made
        require(module)
    _check_distinct(config)
    pick_device(config.device)
    folder = config.resume or config.out or new_place(Path(config.dataset).stem)
    runs = list(config.runs())
    places = [(run, folder if len(runs) == 1 else folder / run_name(run)) for run in runs]
    load = functools.lru_cache(maxsize=1)(load_dataset)
    with open_folder(
        folder, to_json(replace(config, out=None, resume=None)), say=say, how=_how_to_resume(config, folder),
        record=SWEEP, names=(SWEEP, TABLE, CURVES), free=free_settings(config), resume=config.resume is not None,
        ready=lambda: _check_runs(config, places, load),
    ):  # fmt: skip
        text, results = _train_all(folder, places, load)
    say(f"\n{text}\n\ntable: {folder / TABLE}\npicture: {folder / CURVES}")
    return results


def _train_all(folder: Path, places: Places, load: Load) -> tuple[str, list[dict[str, Any]]]:
    """The table and the results of all runs."""
    alone = len(places) == 1
    results: list[dict[str, Any]] = []
    for run, place in places:
        trainer = Trainer(run, load(run.dataset, run.root, run.split))
        make_folder(place)
        with contextlib.nullcontext() if alone else locked(place):
            results.append(train_here(trainer, place, label=run_name(run), beside=_beside(places)))
            if not alone:
                draw_curves([(results[-1], read_log(place))], place / CURVES)
    text = table(results)
    write_text(folder / TABLE, f"{text}\n")
    logs = [(result, read_log(place)) for result, (_, place) in zip(results, places, strict=True)]
    draw_curves(logs, folder / CURVES)
    return text, results


def run_name(run: RunConfig) -> str:
    """The folder of a run in its sweep."""
    return f"{run.attention}-split{run.split}-seed{run.seed}"


def load_sweep(folder: Path, root: Path | None = None) -> SweepConfig:
    """The settings of the sweep in `folder`, ready to be resumed.

    Args:
        folder: of the sweep.
        root: folder of the data sets. Default: that of the sweep, if it is the user's own (see `stored_root`).

    Raises:
        MissingFile: the folder holds no sweep.
        InvalidValue: its settings cannot be read, or its data sets lie where only its own word leads.
    """
    path = folder / SWEEP
    config = from_json(SweepConfig, read_settings(folder, SWEEP), path)
    root = stored_root(path, config.dataset, config.root, root)
    return replace(config, resume=folder, out=None, root=root)


def _how_to_resume(config: SweepConfig, folder: Path) -> str:
    words = ["randbatch", "train", "--resume", str(folder)]
    if needs_root(config.dataset) and not is_own(config.root):
        words += ["--root", str(config.root)]
    return shlex.join(words)


def _check_distinct(config: SweepConfig) -> None:
    for name in ("attention", "split", "seed"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise InvalidValue(f"{name} must name each run once, got {' '.join(map(str, values))}")


def _beside(places: Places) -> tuple[str, ...]:
    """Files of the sweep in the folder of a run: one run alone shares its folder with its sweep."""
    return (SWEEP, TABLE) if len(places) == 1 else ()


def _check_runs(config: SweepConfig, places: Places, load: Load) -> None:
    """Check that every run can start or resume; splits one by one, so that each data set is loaded once."""
    for split in config.split:
        dataset = load(config.dataset, config.root, split)
        for run, place in places:
            if run.split == split:
                _check_run(run, dataset, place, _beside(places))


def _check_run(run: RunConfig, dataset: Dataset, place: Path, beside: tuple[str, ...]) -> None:
    """Check that a run can start or resume, without memory for its model."""
    check_rate(run)

    def make() -> GraphTransformer:
        with torch.device("meta"):
            return make_model(run, dataset)

    if read_run(place, run, dataset, make, beside=beside) is None:
        make()
