"""Several runs, one table, one picture."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randbatch._errors import Interrupted, InvalidValue, MissingFile, UserError
from randbatch._files import check_replaceable, make_folder, read_record, write_record, write_text
from randbatch._folders import check_names, check_new, locked, remove_stale, terminate_as_interrupt
from randbatch._optional import require
from randbatch.train.config import RunConfig, SweepConfig, sweep_from_json, to_json
from randbatch.train.data import Dataset, load_dataset, needs_root
from randbatch.train.folder import CURVES, read_log, read_run
from randbatch.train.loop import Trainer, check_rate, make_model, train_here
from randbatch.train.machine import pick_device
from randbatch.train.report import draw_curves, table

__all__ = ["load_sweep", "stored_root", "train_sweep"]

SWEEP, TABLE = "sweep.json", "table.md"
_OWN_DATA = Path("data")  # where data sets go by default


def train_sweep(config: SweepConfig, *, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Train every run of `config`, print the table, draw the picture; return the results.

    Everything is checked before anything is written: settings, data, what the folder holds. A finished sweep that is
    resumed is read and printed; if its folder cannot be written, nothing has to be.

    Raises:
        UserError, OSError: the data set, a setting, a file or the folder is not what it should be.
        Diverged: a run has no finite loss any more.
        Interrupted: by Ctrl-C or SIGTERM; every finished epoch is on the disk.
    """
    for module in ("matplotlib", "numpy", "safetensors.torch", "tqdm"):  # what is missing shows before a folder is made
        require(module)
    _check_distinct(config)
    pick_device(config.device)
    folder = _folder_of(config)
    with terminate_as_interrupt():
        try:
            return _train_all(config, folder, say)
        except KeyboardInterrupt:
            if not (folder / SWEEP).exists():  # nothing was written
                raise
            raise Interrupted(_how_to_go_on(config, folder)) from None


def _train_all(config: SweepConfig, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    runs = list(config.runs())
    alone = len(runs) == 1
    places = [folder if alone else folder / run_name(run) for run in runs]
    beside = (SWEEP, TABLE) if alone else ()
    load = functools.lru_cache(maxsize=1)(load_dataset)
    with contextlib.ExitStack() as stack:
        if config.resume is not None:
            stack.enter_context(locked(folder))
            check_names(folder, (SWEEP, TABLE, CURVES))
        else:
            _check_new(folder)
        for split in config.split:
            dataset = load(config.dataset, config.root, split)
            for run, place in zip(runs, places, strict=True):
                if run.split == split:
                    _check_run(run, dataset, place, beside)
        if config.resume is None:
            make_folder(folder)
            stack.enter_context(locked(folder))
            _check_new(folder)  # again: somebody else may have been faster
        write_record(folder / SWEEP, to_json(replace(config, out=None, resume=None)))
        remove_stale(folder)
        say(f"results go to {folder}")
        results: list[dict[str, Any]] = []
        for run, place in zip(runs, places, strict=True):
            trainer = Trainer(run, load(run.dataset, run.root, run.split))
            make_folder(place)
            with contextlib.nullcontext() if alone else locked(place):
                results.append(train_here(trainer, place, label=run_name(run), beside=beside))
                if not alone:
                    draw_curves([(results[-1], read_log(place))], place / CURVES)
        text = table(results)
        write_text(folder / TABLE, f"{text}\n")
        draw_curves([(r, read_log(place)) for r, place in zip(results, places, strict=True)], folder / CURVES)
    say(f"\n{text}\n\ntable: {folder / TABLE}\npicture: {folder / CURVES}")
    return results


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
    check_replaceable(path)
    if not path.exists():
        raise MissingFile(f"resume: {folder} holds no run ({SWEEP} is missing)")
    content = read_record(path)
    try:
        config = replace(sweep_from_json(content), resume=folder, out=None)
        names: list[object] = [config.dataset, config.preset, config.device, *config.attention]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("names must be strings")
        list(config.runs())
    except UserError:
        raise
    except Exception as error:  # of any value where another type is due
        raise InvalidValue(f"{path} does not hold the settings of a sweep: {error}") from error
    return replace(config, root=stored_root(path, config.dataset, config.root, root))


def stored_root(source: Path, dataset: str, stored: Path, given: Path | None) -> Path:
    """The folder of the data sets for a run that says itself where they are.

    Reading a data set may run code that lies beside it, so that a run folder from somebody else must not choose the
    place: what it says is followed into the user's own folder `data` alone. A data set without such files is free.

    Args:
        source: the file that says so.
        dataset: name of the data set.
        stored: what it says.
        given: what the user says, which is always followed.

    Raises:
        InvalidValue: it leads elsewhere.
    """
    if given is not None:
        return given
    if needs_root(dataset) and not _is_own(stored):
        raise InvalidValue(
            f"root: {source} says that {dataset!r} lies in {stored}; reading it may run code from there, "
            f"so that this is followed into {_OWN_DATA}/ alone: give it again, --root {shlex.quote(str(stored))}"
        )
    return stored


def _is_own(root: Path) -> bool:
    try:
        return root.resolve().is_relative_to(_OWN_DATA.resolve())
    except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links
        return False


def _how_to_go_on(config: SweepConfig, folder: Path) -> str:
    words = ["randbatch", "train", "--resume", str(folder)]
    if needs_root(config.dataset) and not _is_own(config.root):
        words += ["--root", str(config.root)]
    return shlex.join(words)


def _check_distinct(config: SweepConfig) -> None:
    for name in ("attention", "split", "seed"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise InvalidValue(f"{name} must name each run once, got {' '.join(map(str, values))}")


def _check_run(run: RunConfig, dataset: Dataset, place: Path, beside: tuple[str, ...]) -> None:
    """Check that a run can begin, or go on, without memory for its model."""
    check_rate(run)

    def make() -> nn.Module:
        try:
            with torch.device("meta"):
                return make_model(run, dataset)
        except (ValueError, TypeError) as error:  # a setting that the model does not take
            raise error if isinstance(error, UserError) else InvalidValue(str(error)) from error

    if read_run(place, run, dataset, make, beside=beside) is None:
        make()


def _folder_of(config: SweepConfig) -> Path:
    if config.resume is not None:
        return config.resume
    return config.out or Path("runs") / f"{Path(config.dataset).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def _check_new(folder: Path) -> None:
    """A new sweep does not go into the folder of another, or of anything else."""
    if (folder / SWEEP).exists():
        raise InvalidValue(f"out: {folder} already holds a run; go on with --resume {folder}, or choose another --out")
    check_new(folder)
