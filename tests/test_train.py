"""Training: the numbers of a run, its files, interruption and resumption, and the command line."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn

from randbatch._files import read_record, write_bytes
from randbatch.cli import main
from randbatch.models import ATTENTIONS
from randbatch.train import RunConfig, SweepConfig, load_sweep, train_run, train_sweep
from randbatch.train import loop as loop_module
from randbatch.train.checkpoint import load_weights, read_checkpoint, read_tensors, save_checkpoint, save_tensors
from randbatch.train.data import GroupsOptions, make_groups
from randbatch.train.folder import read_log
from randbatch.train.metrics import loss, score

SMALL = {"hidden": 16, "heads": 2, "layers": 2, "batch_size": 16, "epochs": 6, "dropout": 0.1, "graphs_per_step": 2}
FIELDS = [
    "dataset", "attention", "batch_size", "estimator", "rounds", "seed", "split", "metric", "val", "test", "best_epoch",
    "epochs", "seconds_per_epoch", "peak_memory_bytes", "num_parameters", "config", "data", "versions", "commit",
]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`groups` means a data set of a second."""
    monkeypatch.setattr("randbatch.train.data.make_groups", lambda seed: make_groups(seed, small_groups()))


def small_groups() -> GroupsOptions:
    return GroupsOptions(num_nodes=60, num_groups=2, train_graphs=5, val_graphs=2, test_graphs=2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "best.safetensors")[0]


def numbers(folder: Path) -> tuple:
    """All that a resumed run must reproduce."""
    result = json.loads((folder / "result.json").read_text())
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(folder)]
    return lines, {key: result[key] for key in ("val", "test", "best_epoch", "epochs", "num_parameters")}


# Loss and score


def test_scores_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    logits, y = torch.randn(200, 2), torch.from_numpy(generator.integers(0, 2, 200))
    assert score("accuracy", logits, y) == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert score("rocauc", logits, y) == pytest.approx(roc_auc_score(y, logits.softmax(1)[:, 1]), abs=1e-6)
    many, tasks = torch.randn(200, 3), torch.from_numpy(generator.integers(0, 2, (200, 3))).float()
    assert score("rocauc", many, tasks) == pytest.approx(roc_auc_score(tasks, many, average="macro"), abs=1e-6)
    assert score("f1", many, tasks) == pytest.approx(f1_score(tasks, many > 0, average="micro"), abs=1e-6)
    holes = tasks.clone()
    holes[::7, 1] = torch.nan
    known = ~holes[:, 1].isnan()
    expected = [roc_auc_score(tasks[:, t][k], many[:, t][k]) for t, k in ((0, ...), (1, known), (2, ...))]
    assert score("rocauc", many, holes) == pytest.approx(np.mean(expected), abs=1e-6)
    assert loss(many, holes).isfinite()
    assert loss(logits, y).item() == pytest.approx(nn.CrossEntropyLoss()(logits, y).item())


# A run and its folder


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_run_leaves_what_it_promises(tmp_path: Path, attention: str) -> None:
    config = RunConfig(attention=attention, **SMALL)
    result = train_run(config, make_groups(0, small_groups()), tmp_path / "run")
    assert list(result) == FIELDS
    assert read_record(tmp_path / "run" / "result.json") == result
    lines = read_log(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    best = max(lines, key=lambda line: line["val"])
    assert (result["best_epoch"], result["val"], result["test"]) == (best["epoch"], best["val"], best["test"])
    assert result["batch_size"] == (16 if attention == "rba" else None)
    assert result["num_parameters"] == sum(tensor.numel() for tensor in weights(tmp_path / "run").values())
    assert result["peak_memory_bytes"] > 1e7
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best.safetensors", "checkpoint.safetensors", "log.jsonl", "result.json",
    ]  # fmt: skip


def test_training_learns(tmp_path: Path) -> None:
    """Evidence that is always right: any model must find it."""
    options = replace(small_groups(), right=1.0, num_groups=4, train_graphs=60)
    train_run(RunConfig(**SMALL | {"lr": 1e-2, "dropout": 0.0}), make_groups(0, options), tmp_path)
    assert read_log(tmp_path)[-1]["test"] > 0.95


@pytest.mark.parametrize("stop", [1, 3])
def test_resuming_is_bit_for_bit(tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted inside an epoch, at any place, and resumed: the same numbers as a run that never stopped."""
    config, data = RunConfig(**SMALL), make_groups(0, small_groups())
    train_run(config, data, tmp_path / "whole")
    one_epoch = loop_module._one_epoch

    def interrupted(trainer, epoch, state, folder):
        line = one_epoch(trainer, epoch, state, folder)  # the weights have moved, the best may have been written
        if epoch == stop + 1:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(loop_module, "_one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_run(config, data, tmp_path / "parts")
    assert len(read_log(tmp_path / "parts")) == stop
    assert not (tmp_path / "parts" / "result.json").exists()
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"epoch": 99, "lo')  # a line that was cut
    monkeypatch.setattr(loop_module, "_one_epoch", one_epoch)
    torch.manual_seed(123)  # whatever happened in between
    train_run(config, data, tmp_path / "parts")
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name])


def test_a_longer_run_resumes(tmp_path: Path) -> None:
    config, data = RunConfig(**SMALL), make_groups(0, small_groups())
    train_run(config, data, tmp_path / "whole")
    train_run(replace(config, epochs=2), data, tmp_path / "parts")
    train_run(config, data, tmp_path / "parts")
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts")


def test_the_learning_rate_decays(tmp_path: Path) -> None:
    config = RunConfig(epochs=10, lr=1.0, lr_decay=0.4)
    rates = [config.lr_of(epoch) for epoch in range(1, 11)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert {RunConfig(lr=0.1).lr_of(epoch) for epoch in (1, 200)} == {0.1}
    data = make_groups(0, small_groups())
    decaying = RunConfig(**SMALL | {"epochs": 2}, lr_decay=1.0)
    train_run(decaying, data, tmp_path)
    with pytest.raises(ValueError, match=r"epochs: .* was made with 2, got 3"):  # its rates were those of two epochs
        train_run(replace(decaying, epochs=3), data, tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    config, data = RunConfig(**SMALL | {"epochs": 2}), make_groups(0, small_groups())
    train_run(config, data, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"hidden: .* was made with 16, got 32"):
        train_run(replace(config, hidden=32), data, tmp_path)
    with pytest.raises(ValueError, match=r"lr: .* was made with 0.001, got 0.1"):
        train_run(replace(config, lr=0.1), data, tmp_path)
    with pytest.raises(ValueError, match=r"has run 2 epochs already, it cannot stop at 1"):  # whose score is not known
        train_run(replace(config, epochs=1), data, tmp_path)
    with pytest.raises(ValueError, match=r"is of other data: those of 'groups' are not what it was trained on"):
        train_run(config, make_groups(1, small_groups()), tmp_path)
    assert contents(tmp_path) == before
    checkpoint = tmp_path / "checkpoint.safetensors"
    for content in (before["checkpoint.safetensors"][:-100], before["checkpoint.safetensors"][:50], b"", b"junk" * 99):
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.safetensors is not a whole checkpoint"):
            train_run(config, data, tmp_path)
        assert checkpoint.read_bytes() == content
        assert (tmp_path / "log.jsonl").read_bytes() == before["log.jsonl"]


def linear() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    (model, optimizer), (other, other_optimizer) = linear(), linear()
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "a", model, optimizer, {"epoch": 3})
    draw = torch.rand(3)
    found = read_checkpoint(tmp_path / "a")
    found.restore(other, other_optimizer, stepped=True)
    assert found.about == {"epoch": 3}
    assert torch.equal(draw, torch.rand(3))
    states = (o.state_dict()["state"].values() for o in (optimizer, other_optimizer))
    for ours, theirs in zip(*states, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_tensors(tmp_path / "none")
    save_tensors(tmp_path / "b", {"weight": torch.zeros(2, 3), "extra": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"bias is nothing there and \[2\] float32 here"):
        load_weights(model, read_tensors(tmp_path / "b")[0], tmp_path / "b")


def test_a_checkpoint_is_whole_or_refused(tmp_path: Path) -> None:
    """One flipped bit of a weight, no state of the optimizer, no generator; the model stays as it was."""
    (model, optimizer), (other, other_optimizer) = linear(), linear()
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "a"
    save_checkpoint(path, model, optimizer, {"epoch": 3})
    before, draws = {name: tensor.clone() for name, tensor in other.state_dict().items()}, torch.get_rng_state()
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    with pytest.raises(ValueError, match="was changed since it was written"):
        read_checkpoint(tmp_path / "flipped")
    tensors, about = read_tensors(path)
    for missing, message in (
        ("optimizer.", "the optimizer's state 0 is not whole"),
        ("optimizer.1.", "the optimizer's state 1 is not whole"),
        ("optimizer.0.exp_avg_sq", "the optimizer's state 0 is not whole"),
        ("rng.", "the random number generator's state is not whole"),
        ("model.bias", "is of another model: bias is nothing there"),
    ):
        save_tensors(tmp_path / "b", {n: t for n, t in tensors.items() if not n.startswith(missing)}, about)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / "b").restore(other, other_optimizer, stepped=True)
    save_tensors(tmp_path / "b", tensors | {"more": torch.zeros(1)}, about)
    with pytest.raises(ValueError, match="it holds more"):
        read_checkpoint(tmp_path / "b")
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    assert torch.equal(draws, torch.get_rng_state())


def test_files_are_written_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new, but interrupted")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


# Sweeps


@pytest.mark.usefixtures("small")
def test_a_sweep_makes_a_table_and_pictures(tmp_path: Path) -> None:
    config = SweepConfig(attention=("off", "rba"), split=(0, 1), out=tmp_path / "out", **SMALL | {"epochs": 2})
    said: list[str] = []
    results = train_sweep(config, say=said.append)
    assert [(r["attention"], r["split"]) for r in results] == [("off", 0), ("off", 1), ("rba", 0), ("rba", 1)]
    text = (tmp_path / "out" / "table.md").read_text()
    off = [100 * r["test"] for r in results[:2]]
    assert f"| off | {np.mean(off):.2f} ± {np.std(off, ddof=1):.2f} |" in text
    assert text.strip() in "\n".join(said)
    for picture in (tmp_path / "out").rglob("curves.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "out").rglob("curves.png"))) == 5
    with pytest.raises(ValueError, match="already holds a run; resume it with --resume"):
        train_sweep(config)
    again = train_sweep(load_sweep(tmp_path / "out"), say=said.append)  # nothing left to do
    assert again == results


@pytest.mark.usefixtures("small")
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | {"epochs": 2}).items()]
    assert main(["train", "--attention", "rba", "--lr-decay", "0", "--out", str(out), *flags]) == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["epochs"], result["config"]["hidden"]) == (2, 16)
    assert "| rba (plain, p = 16) |" in capsys.readouterr().out
    assert main(["train", "--resume", str(out), "--epochs", "3"]) == 0
    assert json.loads((out / "result.json").read_text())["epochs"] == 3
    capsys.readouterr()
    assert main(["datasets"]) == 0
    assert "tolokers" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "tolokrs"], "Did you mean 'tolokers'?"),
        (["--dataset", "none.npz"], "none.npz does not exist"),
        (["--preset", "big"], "preset must be one of"),
        (["--device", "tpu9"], "device must be 'auto'"),
        (["--batch-size", "1"], "batch_size must be at least 2, got 1"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--lr", "-1"], "lr must be a finite number > 0, got -1.0"),
        (["--heads", "5"], "hidden must be a multiple of heads, got 64 and 5"),
        (["--seed"], "seed must name at least one"),
        (["--dropout", "1"], "dropout must lie in [0, 1)"),
        (["--split", "0", "-1"], "split must lie in 0 "),
        (["--resume", "nowhere"], "resume: nowhere holds no run"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["train", *arguments])
    except SystemExit as refusal:  # tyro's own
        code = refusal.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()  # nothing was trained


@pytest.mark.usefixtures("small")
def test_a_resumed_run_keeps_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_sweep(SweepConfig(out=tmp_path / "out", **SMALL | {"epochs": 1}), say=lambda _: None)
    for arguments, message in (
        (["--lr", "0.5"], "lr: "),
        (["--dataset", "cora"], "was made with 'groups', got 'cora'"),
        (["--attention", "off"], "attention: "),
    ):
        assert main(["train", "--resume", str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_decaying_run_is_not_prolonged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, and the folder stays as it was: it still resumes."""
    out = tmp_path / "out"
    train_sweep(SweepConfig(out=out, lr_decay=0.5, **SMALL | {"epochs": 1}), say=lambda _: None)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["train", "--resume", str(out), "--epochs", "2"]) == 2
    assert "epochs: " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main(["train", "--resume", str(out)]) == 0


def test_ctrl_c_leaves_a_folder_that_resumes(tmp_path: Path) -> None:
    """A real process, a real signal."""
    arrays = {
        "node_features": np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32),
        "node_labels": np.arange(3000) % 2,
        "edges": np.stack([np.arange(2999), np.arange(1, 3000)], 1),
    }
    for position, role in enumerate(("train", "val", "test")):
        arrays[f"{role}_masks"] = np.arange(3000) % 3 == position
    np.savez(tmp_path / "g.npz", **arrays)
    command = [sys.executable, "-m", "randbatch", "train", "--dataset", str(tmp_path / "g.npz"), "--epochs", "60"]
    command += ["--hidden", "16", "--layers", "1", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, str(tmp_path / "parts")],
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts its background jobs with the signal ignored, and children inherit that
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "parts" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resume with: randbatch train --resume {tmp_path / 'parts'}" in error
    assert "Traceback" not in error
    resume = [sys.executable, "-m", "randbatch", "train", "--resume", str(tmp_path / "parts")]
    subprocess.run(resume, check=True, capture_output=True)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts")
