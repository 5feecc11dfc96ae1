"""Result folders that belong to others, are hostile, locked or read-only: right, or one line and as they were."""

import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import trainings
from damage import in_child, line_of, snapshot
from interrupting import write_data
from trainings import config, quiet, resume

from randbatch import _folders
from randbatch._errors import Interrupted, InvalidValue
from randbatch._files import read_record, write_bytes, write_record
from randbatch._folders import locked, open_folder
from randbatch.train import load_run, load_sweep, train_run, train_sweep
from randbatch.train.data import load_dataset

runs, place = trainings.runs, trainings.place


# Folders of others


def test_out_takes_new_and_empty_folders_only(runs: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data.npz")
    for name in (
        "log.jsonl",
        "table.md",
        "best.safetensors",
        "result.json",
        "sweep.json",
        "settings.json",
        "notes.txt",
    ):
        folder = tmp_path / f"foreign-{name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        line = line_of(lambda folder=folder: train_sweep(config(folder), say=quiet), folder)
        assert line is not None and "out: " in line
        if name != "sweep.json":  # an interrupted sweep may not be told by its name alone
            with pytest.raises(InvalidValue):
                train_run(next(iter(config(folder).runs())), load_dataset(str(tmp_path / "data.npz"), tmp_path), folder)
        assert (folder / name).read_text() == "mine"
        with pytest.raises(InvalidValue), open_folder(folder, {"a": 1}, say=quiet):
            pass
        assert (folder / name).read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "empty")  # a folder may be reached by a link
    train_sweep(config(tmp_path / "way", epochs=1), say=quiet)
    assert (tmp_path / "empty" / "result.json").exists()
    line = line_of(lambda: train_sweep(config(tmp_path / "empty"), say=quiet), tmp_path / "empty")
    assert "already holds a run; resume it with --resume" in (line or "")
    shutil.copytree(runs / "whole-both", tmp_path / "both")  # the folder of one run of a finished sweep
    inner = tmp_path / "both" / "rba-split0-seed0"
    line = line_of(lambda: train_sweep(config(inner, dataset=str(runs / "data.npz")), say=quiet), tmp_path / "both")
    assert "already holds" in (line or "")


def test_out_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    line = line_of(lambda: train_sweep(config(Path(), dataset="data.npz"), say=quiet), tmp_path)
    assert "already holds data.npz" in (line or "")


def test_impossible_places(tmp_path: Path) -> None:
    """A file, a device, a FIFO, a socket, a loop, a name too long, a null byte: one line each, nothing is replaced."""
    write_data(tmp_path / "data.npz")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        places = ["file", "file/run", "fifo", "loop", "loop/run", "dangling", "socket", "n" * 300, "/dev/null"]
        places += ["/dev/null/run", "a\0b", "/proc/run"]
        data = str(tmp_path / "data.npz")
        for name in places:
            out = tmp_path / name
            assert line_of(lambda out=out: train_sweep(config(out, dataset=data), say=quiet), tmp_path) is not None, (
                name
            )
            assert line_of(lambda out=out: load_sweep(out), tmp_path) is not None, name
            assert line_of(lambda out=out: load_run(out), tmp_path) is not None, name
            if name != "file":
                assert line_of(lambda out=out: write_bytes(out, b"x"), tmp_path) is not None, name
        assert not (Path("/dev/null").is_file())


def test_stale_temporaries_go(place: Path) -> None:
    """Those of a killed process go when the run does; anything else that looks a little like them stays."""
    folder = place / "begun"
    (folder / ".randbatch-0123456789abcdef").write_bytes(b"half")
    (folder / ".randbatch-mine").write_bytes(b"mine")
    (folder / ".randbatch-0123456789abcdee").symlink_to(folder / "sweep.json")
    resume(folder)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == [
        ".randbatch-0123456789abcdee", ".randbatch-mine",
    ]  # fmt: skip


# Two at once


def test_a_second_training_gets_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "begun"
    run = next(iter(load_sweep(folder).runs()))
    data = load_dataset(run.dataset, run.root, run.split)
    for flock in (_folders._fcntl, None):  # where folders can be locked, and where they cannot
        monkeypatch.setattr(_folders, "_fcntl", flock)
        with locked(folder):
            text = in_child(lambda: resume(folder))
            assert text.startswith(f"line: {folder} is being written by another process"), text
            assert "is being written by another process" in (line_of(lambda: resume(folder), folder) or "")
            assert line_of(lambda: train_run(run, data, folder), folder) is not None
            settings = {"a": 1}
            with pytest.raises(InvalidValue), locked(folder), open_folder(folder, settings, say=quiet):
                pass
        assert not (folder / ".randbatch-lock").exists()
    resume(folder)
    bench = place / "bench"
    with (
        open_folder(bench, settings, say=quiet),
        pytest.raises(InvalidValue),
        open_folder(bench, settings, say=quiet),
    ):
        pass


def test_another_process_may_be_faster(tmp_path: Path) -> None:
    """A folder that comes into being between the checks and the lock is checked like any other."""
    place = tmp_path / "new"

    def ready() -> None:
        place.mkdir()
        write_record(place / "settings.json", {"a": 2})

    refused = pytest.raises(InvalidValue, match=r"a: .*new was made with 2, got 1")
    with refused, open_folder(place, {"a": 1}, say=quiet, ready=ready):
        pytest.fail("opened")
    assert read_record(place / "settings.json") == {"a": 2}


def test_a_folder_that_exists_is_checked_under_its_lock(tmp_path: Path) -> None:
    seen: list[str] = []

    def ready() -> None:
        with pytest.raises(InvalidValue, match="is being written by another process"), locked(tmp_path):
            pytest.fail("locked twice")
        seen.append("locked")

    with open_folder(tmp_path, {"a": 1}, say=quiet, ready=ready):
        pass
    with locked(tmp_path):  # and is free again
        assert seen == ["locked"]


def test_only_what_was_written_can_be_resumed(tmp_path: Path) -> None:
    """Ctrl-C before anything is written is that alone; later it says how to resume."""
    place = tmp_path / "new folder"

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught, open_folder(place, {"a": 1}, say=quiet, ready=interrupt):
        pytest.fail("opened")
    assert not isinstance(caught.value, Interrupted)
    assert not place.exists()
    with pytest.raises(Interrupted) as caught, open_folder(place, {"a": 1}, say=quiet):
        interrupt()
    assert caught.value.how == f"the same command and --out '{place}'"
    with pytest.raises(Interrupted) as caught, open_folder(place, {"a": 1}, say=quiet, ready=interrupt, how="so"):
        pytest.fail("opened")
    assert caught.value.how == "so"


def test_settings_that_may_change(tmp_path: Path) -> None:
    stale = tmp_path / ".randbatch-0123456789abcdef"
    stale.write_bytes(b"half")  # of a killed process
    with open_folder(tmp_path, {"a": 1, "b": 2, "c": float("nan")}, say=quiet):
        assert not stale.exists()
    with open_folder(tmp_path, {"a": 1, "b": 3, "c": None}, say=quiet, free={"b"}):  # JSON has no NaN
        pass
    assert read_record(tmp_path / "settings.json") == {"a": 1, "b": 3, "c": None}
    for settings, message in (
        ({"a": 2, "b": 3}, r"a: .* was made with 1, got 2"),
        ({"a": 1, "b": 4}, r"b: .* was made with 3, got 4"),
        ({"a": 1, "b": 3, "d": 4}, r"d: .* was made with None, got 4"),
        ({"b": 3}, r"a: .* was made with 1, got None"),
        ({"a": 2, "b": 3, "B": 0}, r"a: .* was made with 1, got 2"),  # settings of both come first
    ):
        refused = pytest.raises(InvalidValue, match=message)
        with refused, open_folder(tmp_path, settings, say=quiet):
            pytest.fail("opened")


# Permissions


def test_permissions(place: Path) -> None:
    """A finished run that cannot be written is read and printed; an interrupted one is one line."""
    assert in_child(lambda: (place / "no.txt").touch()) == "right: None"
    for name in ("finished", "begun"):
        for path in (place / name).iterdir():
            path.chmod(0o444)
        (place / name).chmod(0o555)
    before, data = snapshot(place), str(place / "data.npz")
    assert in_child(lambda: len(resume(place / "finished"))) == "right: 1"
    assert "Permission denied" in in_child(lambda: resume(place / "begun"))
    assert "Permission denied" in in_child(
        lambda: train_sweep(config(place / "begun" / "new", dataset=data), say=quiet)
    )
    assert snapshot(place) == before
    for name in ("sweep.json", "checkpoint.safetensors", "log.jsonl", "result.json", "best.safetensors"):
        (place / "finished" / name).chmod(0)
        text = in_child(lambda: resume(place / "finished"))
        assert text.startswith("line: ") and "Permission denied" in text and name in text, text
        (place / "finished" / name).chmod(0o444)
    (place / "finished").chmod(0)
    assert "Permission denied" in in_child(lambda: resume(place / "finished"))
    (place / "finished").chmod(0o755)


# Hostile folders


class Marker:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def hostile(folder: Path, marker: Path) -> None:
    """A folder in which ogb finds a pickle that runs code."""
    processed = folder / "ogbn_arxiv" / "processed"
    processed.mkdir(parents=True)
    (folder / "ogbn_arxiv" / "RELEASE_v1.txt").touch()
    torch.save({"graph": Marker(marker)}, processed / "data_processed", pickle_module=pickle)


def test_a_run_folder_does_not_choose_what_is_unpickled(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    hostile(tmp_path / "hostile", marker)
    for name in ("finished", "begun"):
        folder = place / name
        for root in (
            tmp_path / "hostile",
            Path("hostile"),
            Path("data/../hostile"),
            Path("data-hostile"),
            Path("link"),
        ):
            if root == Path("link"):
                root.symlink_to(tmp_path / "hostile") if not root.is_symlink() else None
            change = {"dataset": "ogbn-arxiv", "root": str(root)}
            write_record(folder / "sweep.json", read_record(folder / "sweep.json") | change)
            line = line_of(lambda folder=folder: resume(folder), folder)
            assert line is not None and "give it again, --root" in line
            if name == "finished":
                result = read_record(folder / "result.json")
                write_record(folder / "result.json", result | {"config": result["config"] | change})
                line = line_of(lambda folder=folder: load_run(folder), folder)
                assert line is not None and "give it again, --root" in line
    assert not marker.exists()
    assert line_of(lambda: resume(place / "finished", tmp_path / "hostile"), place / "finished") is not None
    assert marker.exists()  # the danger is real: this is what is not followed


def test_the_own_data_folder_is_followed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("data", "data/more", str(tmp_path / "data")):
        path = place / "begun" / "sweep.json"
        write_record(path, read_record(path) | {"dataset": "cora", "root": root})
        assert load_sweep(place / "begun").root == Path(root)
    write_record(path, read_record(path) | {"dataset": "groups", "root": "/anywhere"})
    assert load_sweep(place / "begun").dataset == "groups"  # it has no files
