"""Trainings of a moment, whole and interrupted, for the tests of their folders. The fixtures are `runs` and `place`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interrupting import Training, write_data

from randbatch._files import read_record
from randbatch.train import SweepConfig, load_sweep, train_sweep
from randbatch.train import loop as loop_module


def config(folder: Path, **changes: Any) -> SweepConfig:
    """A training of a moment on the data set beside its folder."""
    small = SweepConfig(
        dataset=str(folder.parent / "data.npz"), attention=("rba",), hidden=8, heads=2, layers=1, batch_size=16,
        epochs=4, dropout=0.1, device="cpu", out=folder,
    )  # fmt: skip
    return replace(small, **changes)


def quiet(_: str) -> None:
    pass


def resume(folder: Path, root: Path | None = None, **changes: Any) -> list[dict[str, Any]]:
    return train_sweep(replace(load_sweep(folder, root), **changes), say=quiet)


def facts(folder: Path) -> dict[str, Any]:
    found = Training(folder, []).facts()
    return {key.replace(folder.name, "run", 1): value for key, value in found.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`finished`; `begun`, the same interrupted in epoch 3; `both`, two runs of which the second is interrupted."""
    base = tmp_path_factory.mktemp("runs")
    write_data(base / "data.npz")
    train_sweep(config(base / "finished"), say=quiet)
    train_sweep(config(base / "whole-both", seed=(0, 1)), say=quiet)
    for name, seeds, stop in (("begun", (0,), 3), ("both", (0, 1), 7)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_in(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                train_sweep(config(base / name, seed=seeds), say=quiet)
    return base


def interrupt_in(patch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C at the end of the epoch of this number, counted over all runs."""
    one_epoch, seen = loop_module._one_epoch, [0]

    def interrupted(*arguments: Any) -> dict[str, Any]:
        line = one_epoch(*arguments)
        seen[0] += 1
        if seen[0] == number:
            raise KeyboardInterrupt
        return line

    patch.setattr(loop_module, "_one_epoch", interrupted)


@pytest.fixture
def place(runs: Path, tmp_path: Path) -> Path:
    """A copy of all runs, and their data where they look for them."""
    shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    for path in (tmp_path / "runs").rglob("sweep.json"):
        assert read_record(path)["dataset"] == str(runs / "data.npz")
    return tmp_path / "runs"
