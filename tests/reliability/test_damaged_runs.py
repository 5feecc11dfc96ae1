"""Run folders that are damaged: the numbers of a whole run, or one line and the folder as it was."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import trainings
from damage import DAMAGES, line_of
from interrupting import write_data
from trainings import config, facts, quiet, resume

from randbatch._files import read_record, write_record
from randbatch.train import load_run, train_sweep
from randbatch.train.checkpoint import read_tensors, save_tensors

runs, place = trainings.runs, trainings.place
FILES = (
    "sweep.json",
    "checkpoint.safetensors",
    "best.safetensors",
    "log.jsonl",
    "result.json",
    "table.md",
    "curves.png",
)


@pytest.mark.parametrize("state", ["begun", "finished"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(runs: Path, tmp_path: Path, state: str, damage: str) -> None:
    """Every kind of damage to every file: the numbers of a run that was not damaged, or one line."""
    right = facts(runs / "finished")
    files = [name for name in FILES if (runs / state / name).exists()]
    assert len(files) == {"begun": 4, "finished": 7}[state]
    for number, name in enumerate(files):
        folder = tmp_path / str(number) / "run"
        shutil.copytree(runs / state, folder)
        DAMAGES[damage](folder / name, random.Random(f"{state} {damage} {name}"))
        line = line_of(lambda folder=folder: resume(folder), folder)
        if line is None:
            found = facts(folder)
            assert found == right, f"{damage} of {name} was taken for a run"
        else:
            assert damage not in ("loop",) or str(folder) in line


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_second_run(runs: Path, tmp_path: Path, damage: str) -> None:
    """The second run of a sweep is looked at before the first one writes: `line_of` sees the whole folder."""
    for name in ("checkpoint.safetensors", "log.jsonl", "best.safetensors"):
        folder = tmp_path / name / "sweep"
        shutil.copytree(runs / "both", folder)
        for path in (folder / "rba-split0-seed0").iterdir():
            if path.name == "result.json":
                path.unlink()  # so that the first has something to write
        DAMAGES[damage](folder / "rba-split0-seed1" / name, random.Random(f"{damage} {name}"))
        if line_of(lambda folder=folder: resume(folder), folder) is None:
            for seed in (0, 1):
                part = f"rba-split0-seed{seed}"
                assert facts(folder / part) == facts(runs / "whole-both" / part)


def test_swapped_runs(place: Path) -> None:
    """The folders of two runs, and single files of theirs, exchanged."""
    first, second = (place / "whole-both" / f"rba-split0-seed{seed}" for seed in (0, 1))
    for name in (None, "checkpoint.safetensors", "best.safetensors", "log.jsonl", "result.json"):
        one, other = (first, second) if name is None else (first / name, second / name)
        keep = place / "keep"
        one.rename(keep), other.rename(one), keep.rename(other)
        assert line_of(lambda: resume(place / "whole-both"), place / "whole-both") is not None, name
        one.rename(keep), other.rename(one), keep.rename(other)
    assert line_of(lambda: resume(place / "whole-both"), place / "whole-both") is None


@pytest.mark.unchecked
@pytest.mark.parametrize("name", ["sweep.json", "result.json", "log.jsonl", "checkpoint.safetensors"])
def test_wrong_types(place: Path, name: str) -> None:
    """Every value replaced by five of other kinds, with checksums that are right: somebody meant it."""
    whole = place / "finished" / name
    wrong: list[Any] = [None, [], {}, "x", "", -1, 0.5, True, 10**30, 1e308, "\0", "\ud800", [[]], {"a": []}]
    content = _content(whole)
    count = 0
    for key in content:
        for value in random.Random(f"{name} {key}").sample(wrong, 5):
            folder = place / f"{count}"
            shutil.copytree(place / "finished", folder)
            _write_content(folder / name, content | {key: value})
            line = line_of(lambda folder=folder: resume(folder), folder)
            if name == "result.json":
                line_of(lambda folder=folder: load_run(folder), folder)
            if line is None:
                assert facts(folder)["run rest"][0] == facts(place / "finished")["run rest"][0]
            count += 1
    assert count == len(content) * 5 >= 25


def _content(path: Path) -> dict[str, Any]:
    """What can be replaced in a file: its values, and those one level below."""
    if path.suffix == ".json":
        content = read_record(path)
        return content | {f"config.{key}": value for key, value in content.get("config", {}).items()}
    if path.suffix == ".jsonl":
        return json.loads(path.read_text().splitlines()[1])
    about = read_tensors(path)[1]
    return about | {f"state.{key}": value for key, value in about["state"].items()}


def _write_content(path: Path, changed: dict[str, Any]) -> None:
    content = {key: value for key, value in changed.items() if "." not in key}
    for key, value in changed.items():
        above, _, below = key.rpartition(".")
        if above and isinstance(content[above], dict):
            content[above][below] = value
    if path.suffix == ".json":
        write_record(path, content)
    elif path.suffix == ".jsonl":
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[0], json.dumps(content) + "\n", *lines[2:]]))
    else:
        save_tensors(path, read_tensors(path)[0], content)


def test_no_optimizer_and_no_log(place: Path) -> None:
    """What was lost is not made up, though every checksum is right."""
    path = place / "begun" / "checkpoint.safetensors"
    tensors, about = read_tensors(path)
    save_tensors(path, {name: t for name, t in tensors.items() if not name.startswith("optimizer")}, about)
    assert "optimizer's state 0 is not whole" in (line_of(lambda: resume(place / "begun"), place / "begun") or "")
    save_tensors(path, tensors, about)
    log = place / "begun" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:1]))
    assert "must hold the 2 epochs" in (line_of(lambda: resume(place / "begun"), place / "begun") or "")
    log.write_text("".join([lines[0].replace("0.", "1.", 1), *lines[1:]]))
    assert "is not the log of this run" in (line_of(lambda: resume(place / "begun"), place / "begun") or "")
    log.write_text("".join(lines))
    assert line_of(lambda: resume(place / "begun"), place / "begun") is None


def test_other_data_at_the_same_path(runs: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data.npz")
    run = tmp_path / "run"
    train_sweep(config(run), say=quiet)
    write_data(tmp_path / "data.npz", num_nodes=66)
    assert "is of other data" in (line_of(lambda: resume(run), run) or "")
    assert "is of other data" in (line_of(lambda: load_run(run), run) or "")


def test_prolonged_and_refused(place: Path) -> None:
    """A refused prolongation writes nothing; one that was interrupted is not analysed as if it were finished."""
    folder = place / "finished"
    assert "cannot stop at 3" in (line_of(lambda: resume(folder, epochs=3), folder) or "")
    best = folder / "best.safetensors"
    weights, about = read_tensors(best)
    save_tensors(best, weights, about | {"epoch": 5})  # of the first epoch after the result
    assert "prolonged and interrupted is not finished" in (line_of(lambda: load_run(folder), folder) or "")
    best.write_bytes(b"")
    assert line_of(lambda: resume(folder, epochs=6), folder) is not None
