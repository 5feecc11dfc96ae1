"""Run folders that are damaged, foreign, hostile, locked or not writable: right, or one line and as they were."""

import json
import os
import pickle
import random
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import DAMAGES, in_child, line_of, snapshot
from interrupting import Training, write_data

from randbatch import _files, _folders
from randbatch._errors import InvalidValue, UserError
from randbatch._files import append_text, open_regular, read_json, read_record, write_bytes, write_json, write_record
from randbatch._folders import locked
from randbatch.experiments.folders import open_folder
from randbatch.train import SweepConfig, train_run, train_sweep
from randbatch.train import loop as loop_module
from randbatch.train.analyze import load_run
from randbatch.train.checkpoint import read_tensors, save_tensors
from randbatch.train.data import load_dataset
from randbatch.train.loop import Diverged
from randbatch.train.sweep import load_sweep

FILES = (
    "sweep.json",
    "checkpoint.safetensors",
    "best.safetensors",
    "log.jsonl",
    "result.json",
    "table.md",
    "curves.png",
)


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
    """`finished`; `begun`, the same interrupted in epoch 3; `both`, two runs of which the second is begun."""
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


# Damage to every file


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
    (folder / "best.safetensors").write_bytes(b"")
    assert line_of(lambda: resume(folder, epochs=6), folder) is not None
    shutil.copy(place / "begun" / "best.safetensors", folder)
    shutil.copytree(place / "finished", place / "again", dirs_exist_ok=True)


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
        with pytest.raises(InvalidValue), open_folder(folder, "bench", {"a": 1}, quiet):
            pass
        assert (folder / name).read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "empty")  # a folder may be reached by a link
    train_sweep(config(tmp_path / "way", epochs=1), say=quiet)
    assert (tmp_path / "empty" / "result.json").exists()
    line = line_of(lambda: train_sweep(config(tmp_path / "empty"), say=quiet), tmp_path / "empty")
    assert "already holds a run; go on with --resume" in (line or "")
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


# Writing


def test_only_regular_files_are_read_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    for name, kind in (
        ("fifo", "a FIFO"),
        ("link", "a symbolic link"),
        ("folder", "a folder"),
        ("/dev/null", "a device"),
    ):
        path = tmp_path / name
        for call in (
            lambda path=path: write_bytes(path, b"x"),
            lambda path=path: write_json(path, {}),
            lambda path=path: read_json(path),
        ):
            assert f"must be a regular file, it is {kind}" in (line_of(call, tmp_path) or "")
        assert line_of(lambda path=path: append_text(path, "x"), tmp_path) is not None or name == "/dev/null"
    with open_regular(tmp_path / "link", links=True) as file:  # data may lie elsewhere
        assert file.read() == b"{}"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "new" / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "file").stat().st_mode & 0o777 == mode


def test_a_file_and_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content before the move, the folder after it, and the folder above a new folder."""
    synced: list[Path] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_bytes(tmp_path / "new" / "file", b"x")
    assert [synced[0], synced[2]] == [tmp_path, tmp_path / "new"]
    assert synced[1].parent == tmp_path / "new"
    assert len(synced) == 3


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """Written as null, so that any reader of JSON takes it; refused where somebody else wrote them."""
    path = tmp_path / "a.json"
    write_json(path, {"nan": float("nan"), "list": [float("inf"), 1.5, (float("-inf"),)]})
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"nan": None, "list": [None, 1.5, [None]]}
    for text in ("NaN", "[Infinity]", "-Infinity", "1e999", "{", "[" * 100_000, '"\udcff"', "9" * 5000):
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert line_of(lambda: read_json(path), tmp_path) is not None, text[:20]


def test_records_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {"a": 0.1 + 0.2, "b": [1, None, "ä"], "c": {"d": True}}
    write_record(path, content)
    assert read_record(path) == content
    text = path.read_text()
    for old, new in (("0.30000000000000004", "0.3"), ("true", "false"), ('"c"', '"e"')):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(InvalidValue, match="was changed since it was written"):
            read_record(path)
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidValue, match="is no record of randbatch"):
        read_record(path)


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
            with pytest.raises(InvalidValue), locked(folder), open_folder(folder, "bench", settings, quiet):
                pass
        assert not (folder / ".randbatch-lock").exists()
    resume(folder)
    bench = place / "bench"
    with (
        open_folder(bench, "bench", settings, quiet),
        pytest.raises(InvalidValue),
        open_folder(bench, "bench", settings, quiet),
    ):
        pass


# Permissions


def test_permissions(place: Path) -> None:
    """A finished run that cannot be written is read and printed; a begun one is one line."""
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


# Divergence


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


def test_files_are_documented_by_their_module() -> None:
    """Every writer of the package goes through `_files`."""
    package = Path(_files.__file__).parent
    for path in package.rglob("*.py"):
        if path.name in ("_files.py", "_folders.py", "build.py", "machine.py"):  # a compiler's cache; /proc
            continue
        text = path.read_text()
        for word in (".write_text(", ".write_bytes(", 'open("w', 'open("a', ".savefig("):
            assert word not in text or path.name == "frames.py", f"{path} writes a file by itself"
