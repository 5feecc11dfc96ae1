"""What the user can fix is one line and exit code 2; a fault of the package shows its traceback, whatever its type."""

import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from randbatch._errors import InvalidValue
from randbatch.cli import COMMANDS, Command, main
from randbatch.train import RunConfig, SweepConfig, load_sweep, train_sweep
from randbatch.train.config import to_json
from randbatch.train.data import GroupsOptions, make_groups
from randbatch.train.stored import from_json

SMALL = ["--epochs", "1", "--hidden", "8", "--heads", "2", "--layers", "1", "--batch-size", "16", "--device", "cpu"]
PARTICLES = ["--num-particles", "4", "--batch-size", "2"]
OWN = "this is a fault of randbatch; please report it with the lines above"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`groups` is a data set of a moment, and results go to a folder of the test."""
    options = GroupsOptions(num_nodes=20, num_groups=2, train_graphs=2, val_graphs=1, test_graphs=1)
    monkeypatch.setattr("randbatch.train.data.make_groups", lambda seed: make_groups(seed, options))
    monkeypatch.chdir(tmp_path)


# At the top of a command


def refused_by(error: BaseException, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    def run(_: object) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "datasets", replace(COMMANDS["datasets"], run=run))
    return main(["datasets", *words])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InvalidValue("a must be b,\n got c"), "a must be b, got c"),
        (FileNotFoundError(errno.ENOENT, "No such file", "some.npz"), "some.npz: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "some"), "some: Permission denied"),
        (OSError("of another kind"), "of another kind"),
        (MemoryError(), "there is not enough memory: take smaller numbers"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "there is not enough memory: CUDA out of memory."),
    ],
)
def test_what_the_user_can_fix_is_a_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused_by(error, monkeypatch) == 2
    assert capsys.readouterr().err == f"randbatch: {line}\n"
    assert refused_by(error, monkeypatch, "--debug") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith(f"randbatch: {line}\n")


@pytest.mark.parametrize("make", [lambda: torch.empty(2**50), lambda: torch.empty(2**62, 2**62)], ids=["much", "more"])
def test_sizes_that_no_memory_has_are_a_line(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError) as caught:
        make()
    assert refused_by(caught.value, monkeypatch) == 2
    assert capsys.readouterr().err.startswith("randbatch: there is not enough memory: ")


@pytest.mark.parametrize("error", [ValueError("x"), TypeError("x"), KeyError("x"), RuntimeError("x"), ImportError("x")])
def test_a_fault_of_ours_is_not_hidden(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused_by(error, monkeypatch) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.splitlines()[-1] == "randbatch: this is a fault of randbatch; please report it with the lines above"


# Deep inside of every command

FAULTS: list[tuple[str, list[str], str]] = [
    ("train", SMALL, "randbatch.models.graph_transformer.fold_seed"),  # where the model is made
    ("train", SMALL, "randbatch.train.loop.score"),
    ("train", SMALL, "randbatch.train.report.write_picture"),
    ("analyze", ["run"], "randbatch.train.load.read_result"),
    ("convergence", [*PARTICLES, "--realisations", "2"], "randbatch.particles.convergence.solve"),
    ("convergence", ["--run", "run"], "randbatch.train.load.read_result"),
    ("simulate", PARTICLES, "randbatch.particles.solver._check_finite"),
    ("bench", ["--tokens", "128"], "randbatch.cli.studies.timing.peak_allocated"),
    ("plan", ["--nodes", "100", "--edges", "10"], "randbatch.models.graph_transformer.fold_seed"),
    ("datasets", [], "randbatch.cli.datasets.DATASETS"),
]
"""Command, its words, and what raises."""


@dataclass
class Raises:
    """A function, or a list of names, that raises."""

    error: Exception
    called: list[bool] = field(default_factory=list)

    def __call__(self, *_: object, **__: object) -> None:
        self.called.append(True)
        raise self.error

    def __iter__(self) -> Iterator[str]:
        self()
        yield ""


def test_the_faults_are_of_every_command() -> None:
    assert {command for command, _, _ in FAULTS} == set(COMMANDS)


@pytest.mark.parametrize(("command", "words", "place"), FAULTS, ids=[f"{name} {place}" for name, _, place in FAULTS])
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
@pytest.mark.parametrize(("kind", "code"), [(ValueError, 1), (InvalidValue, 2)])
def test_a_fault_is_told_from_a_mistake(
    command: str, words: list[str], place: str, debug: list[str], kind: type[Exception], code: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    raises = Raises(kind("some reason"))
    monkeypatch.setattr(place, raises)
    assert main([command, *words, *debug]) == code
    said = capsys.readouterr().err
    assert raises.called
    assert ("Traceback" in said) == (f"{kind.__name__}: some reason" in said) == (code == 1 or bool(debug))
    assert said.splitlines()[-1] == f"randbatch: {OWN if code == 1 else 'some reason'}"


# In the settings


@pytest.mark.parametrize("command", [name for name in COMMANDS if hasattr(COMMANDS[name].settings, "__post_init__")])
@pytest.mark.parametrize(("kind", "code"), [(ValueError, 1), (TypeError, 1), (InvalidValue, 2)])
def test_a_fault_in_the_settings_is_told_from_a_mistake(
    command: str, kind: type[Exception], code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(COMMANDS[command].settings, "__post_init__", Raises(kind("some reason")))
    needed = {"plan": ["--nodes", "100", "--edges", "10"], "analyze": ["run"]}
    assert main([command, *needed.get(command, [])]) == code
    said = capsys.readouterr().err
    assert ("Traceback" in said) == (code == 1)
    assert said.splitlines()[-1] == f"randbatch: {OWN if code == 1 else 'some reason'}"


@dataclass(frozen=True)
class Inner:
    """Settings inside of settings."""

    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidValue(f"size must be at least 1, got {self.size}")


@dataclass(frozen=True)
class Outer:
    """Settings."""

    inner: Inner = field(default_factory=Inner)


def test_settings_inside_of_settings_are_told_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "toy", Command("toy", "a toy", Outer, lambda config: print(config.inner.size)))
    assert main(["toy", "--inner.size", "3"]) == 0
    assert capsys.readouterr().out == "3\n"
    assert main(["toy", "--inner.size", "0"]) == 2
    assert capsys.readouterr().err == "randbatch: size must be at least 1, got 0\n"
    with pytest.raises(SystemExit):  # tyro's own
        main(["toy", "--inner.size", "x"])
    assert "Traceback" not in capsys.readouterr().err


def test_a_fault_in_stored_settings_is_not_told_as_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SMALL, "--attention", "off", "--lr-decay", "0", "--out", "run"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(RunConfig, "__post_init__", Raises(ValueError("some reason")))
    for words in (["train", "--resume", "run"], ["analyze", "run"]):
        assert main(words) == 1
        assert "ValueError: some reason" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "holds unknown settings: colour"),
        ({"epochs": "3"}, "epochs has no value of its type, got '3'"),
        ({"epochs": True}, "epochs has no value of its type, got True"),
        ({"lr": "0.1"}, "lr has no value of its type"),
        ({"lr": 10**400}, "lr has no value of its type"),
        ({"seed": 0}, "seed has no value of its type, got 0"),
        ({"seed": [0.5]}, "seed has no value of its type"),
        ({"attention": ["rab"]}, "attention must be one of"),
        ({"chunk_batches": "all"}, "chunk_batches has no value of its type"),
        ({"eval_rounds": 0}, "eval_rounds must be at least 1, got 0"),
    ],
)
def test_stored_settings_are_read_by_their_types(change: dict[str, Any], message: str) -> None:
    stored = to_json(SweepConfig(chunk_batches="auto", eval_rounds=2, lr=0.5, seed=(0, 1)))
    plain = json.loads(json.dumps(stored))
    assert to_json(from_json(SweepConfig, plain, Path("sweep.json"))) == stored
    with pytest.raises(InvalidValue, match=re.escape(message)):
        from_json(SweepConfig, plain | change, Path("sweep.json"))


def test_a_sweep_resumes_with_its_settings_alone_in_python_too(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", *SMALL, "--attention", "off", "--lr-decay", "0", "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    stored = load_sweep(out)
    changes: dict[str, Any] = {
        "seed": (0, 1), "attention": ("rba",), "preset": "small-graph", "lr": 0.5, "lr_decay": 0.5
    }  # fmt: skip
    for name, value in changes.items():
        with pytest.raises(InvalidValue, match=rf"{name}: .*run was made with .*, got .*; other settings need another"):
            train_sweep(replace(stored, **{name: value}), say=lambda _: None)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(FileNotFoundError, match=r"resume: .*nothing holds no run \(sweep.json is missing\)"):
        train_sweep(replace(stored, resume=tmp_path / "nothing"), say=lambda _: None)
    assert not (tmp_path / "nothing").exists()
