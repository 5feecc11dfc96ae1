"""Trainings without a result: divergence, numbers beyond float32, runs named twice, missing packages."""

import json
from pathlib import Path
from typing import Any

import pytest
from interrupting import write_data
from trainings import config, quiet, resume

from randbatch._errors import UserError
from randbatch.train import train_sweep
from randbatch.train.loop import Diverged


def test_a_diverged_training_is_no_result(tmp_path: Path) -> None:
    write_data(tmp_path / "data.npz")
    folder = tmp_path / "run"
    with pytest.raises(Diverged, match=r"training of rba-split0-seed0 diverged in epoch \d: .* now 1e\+30"):
        train_sweep(config(folder, lr=1e30), say=quiet)
    assert not (folder / "result.json").exists()
    for path in folder.rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=lambda name: pytest.fail(name))
    with pytest.raises(Diverged, match="diverged in epoch"):  # and again, from where it was
        resume(folder)


@pytest.mark.parametrize("change", [{"lr": 1e300}, {"lr": 1e38}, {"weight_decay": 1e300}, {"weight_decay": 1e38}])
def test_numbers_beyond_float32(tmp_path: Path, change: dict[str, float]) -> None:
    write_data(tmp_path / "data.npz")
    with pytest.raises(UserError):
        train_sweep(config(tmp_path / "run", **change), say=quiet)
    assert not (tmp_path / "run" / "result.json").exists()


def test_runs_are_named_once(tmp_path: Path) -> None:
    write_data(tmp_path / "data.npz")
    for change in ({"seed": (0, 0)}, {"split": (0, 0)}, {"attention": ("rba", "off", "rba")}):
        with pytest.raises(ValueError, match=rf"{next(iter(change))} must name each run once|must"):
            train_sweep(config(tmp_path / "run", **change), say=quiet)
    assert not (tmp_path / "run").exists()


def test_missing_extras_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import randbatch.train.sweep as module

    write_data(tmp_path / "data.npz")
    for name in ("matplotlib", "safetensors.torch", "tqdm"):

        def require(module: str, name: str = name) -> Any:
            if module == name:
                raise ImportError(f"this needs {name}")

        monkeypatch.setattr(module, "require", require)
        with pytest.raises(ImportError, match=name):
            train_sweep(config(tmp_path / "run"), say=quiet)
    assert not (tmp_path / "run").exists()
