"""Every flag of every command with values that it does not take: refused in one line, and no file is made.

The table makes itself from the settings of the commands, so that a new flag is in it; `TAKEN` says which of the values
are good for which flag. The commands do nothing but to check here, so that hundreds of cases take seconds.
"""

import dataclasses
import itertools
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from randbatch.analysis import attention_error
from randbatch.cli import COMMANDS, analyze, main
from randbatch.train.machine import pick_device

BEYOND, LONG = str(2**64), "9" * 5000
INTS = ("0", "-1", BEYOND, f"-{BEYOND}", "1.5", "1e3", "nan", "", "x", LONG)
FLOATS = ("0", "-1", "nan", "inf", "-inf", "1e999", "-1e-400", "", "x", LONG)
WORDS = ("", "x", "-1", "\n", "ä", "x" * 5000, "rba,full")

REQUIRED = {"analyze": ["run"], "plan": ["--nodes", "10000", "--edges", "20000"]}
"""What a command cannot do without."""

TAKEN: dict[tuple[str, str], tuple[str, ...]] = {
    ("train", "layers"): ("0",),
    ("train", "lr_decay"): ("0", "-1e-400"),
    ("train", "weight_decay"): ("0", "-1e-400"),
    ("train", "dropout"): ("0", "-1e-400"),
    ("train", "input_dropout"): ("0", "-1e-400"),
    ("train", "attention_dropout"): ("0", "-1e-400"),
    ("train", "split"): ("0",),
    ("train", "seed"): ("0", "-1"),
    ("analyze", "seed"): ("0", "-1"),
    ("convergence", "seed"): ("0", "-1"),
    ("simulate", "seed"): ("0", "-1"),
    ("bench", "most_of_full"): ("0",),
    ("plan", "edges"): ("0",),
    ("plan", "layers"): ("0",),
    ("plan", "dropout"): ("0", "-1e-400"),
}  # fmt: skip
"""Of the values above, those that are good: a number at the edge of what is taken. All others are refused."""

ABSENT = {("train", "resume"), ("analyze", "run")}
"""Paths of what must be there."""

TOGETHER: dict[str, list[list[str]]] = {
    "train": [
        ["--hidden", "64", "--heads", "5"],
        ["--estimator", "corrected", "--chunk-batches", "4"],
        ["--lr-decay", "1.1"],
        ["--dropout", "1"],
        ["--dataset", "groups.npz.x"],
        ["--dataset"],
        ["--device", "cuda:-1"],
        ["--device", "cpu:1"],
        ["--device", "meta"],
        ["--device", "mps"],
        ["--layers", "10001"],
        ["--no-such-flag", "1"],
        ["surplus"],
    ],
    "analyze": [["--batch-size", "1"], ["--tolerance", "1e400"], ["surplus"]],
    "convergence": [
        ["--dt", "0.5", "0.25"],
        ["--dt", "0.5", "0.25", "0.3"],
        ["--dt", "1", "0.5", "0.2"],
        ["--dt", "1e-300", "0.5", "0.25"],
        ["--t1", "1e300", "--dt", "0.5", "0.25", "0.125"],
        ["--batch-size", "65"],
        ["--system", "softmax", "--method", "rbm1"],
        ["--system", "thomson"],
        ["--method", "direct"],
        ["--root", "data"],
        ["--run", "run", "--dt", "0.5", "0.25", "0.125"],
        ["--run", "run", "--batch-size", "1"],
        ["--run", "run", "--batch-size", "64", "64"],
        ["--run", "run", "--realisations", "1"],
        ["--run", "run", "--seed", BEYOND],
    ],
    "simulate": [
        ["--dt", "0.3", "--t1", "1"],
        ["--dt", "1e-300"],
        ["--t1", "1e300"],
        ["--frames", "1"],
        ["--frames", str(2**40)],
        ["--method", "direct", "--batch-size", "2"],
        ["--batch-size", "1001"],
        ["--num-particles", "1"],
        ["--film", "x"],
    ],
    "bench": [
        ["--tokens", "100"],
        ["--channels", "64", "--heads", "5"],
        ["--batch-size", "1"],
        ["--tokens", str(2**63)],
        ["--tokens", "128", BEYOND],
        ["--device", "mps"],
    ],
    "plan": [
        ["--nodes", "1"],
        ["--hidden", "64", "--heads", "5"],
        ["--memory", "16"],
        ["--memory", "0GB"],
        ["--memory", "-1GB"],
        ["--memory", "nanGB"],
        ["--memory", "1e400GB"],
        ["--memory", f"{LONG}GB"],
        ["--memory", "16XB"],
        ["--batch-size", "1"],
    ],
    "datasets": [["--x"], ["x"]],
}
"""Numbers that do not go together, and more of what one flag does not take."""


@dataclasses.dataclass(frozen=True)
class Case:
    command: str
    words: list[str]
    is_taken: bool = False


def fields_of(command: str) -> dict[str, Any]:
    """Field → its type, without None."""
    config = COMMANDS[command].settings
    hints = typing.get_type_hints(config)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(one for one in typing.get_args(kind) if one is not types.NoneType)
        found[field.name] = kind
    return found


def is_required(command: str, name: str) -> bool:
    fields = dataclasses.fields(COMMANDS[command].settings)
    return next(field.default is dataclasses.MISSING for field in fields if field.name == name)


def values_of(kind: Any) -> tuple[str, ...]:
    """What a flag of a type may be given, most of it bad."""
    if typing.get_origin(kind) is tuple:
        return values_of(typing.get_args(kind)[0])
    if kind in (int, float):
        return INTS if kind is int else FLOATS
    if kind is str or typing.get_origin(kind) is Literal:
        return WORDS
    return {Path: ("",), bool: ("0", "x", "")}[kind]


def twice_of(command: str, name: str, kind: Any) -> list[str]:
    """A good value of a flag that takes several, twice."""
    first = typing.get_args(kind)[0]
    if typing.get_origin(first) is Literal:
        return [typing.get_args(first)[0]] * 2
    default = next(field.default for field in dataclasses.fields(COMMANDS[command].settings) if field.name == name)
    some = {"dt": "0.25", "method": "rbm1", "case": "layer", "batch_size": "2"}
    return [str(default[0]) if isinstance(default, tuple) else some[name]] * 2


def cases_of(command: str) -> Iterator[Case]:
    for name, kind in fields_of(command).items():
        is_position = COMMANDS[command].positional and is_required(command, name)
        flag = [] if is_position else [f"--{name.replace('_', '-')}"]
        needed = [] if is_position else REQUIRED.get(command, [])
        for value in values_of(kind):
            yield Case(command, [*needed, *flag, value], value in TAKEN.get((command, name), ()))
            if flag and value:  # the other way to write it
                yield Case(command, [*needed, f"{flag[0]}={value}"], value in TAKEN.get((command, name), ()))
        if (command, name) in ABSENT:
            yield Case(command, [*needed, *flag, "nothing here"])
        if flag and kind is not bool:
            yield Case(command, [*needed, *flag])  # without a value
        if typing.get_origin(kind) is tuple:
            yield Case(command, [*needed, *flag, *twice_of(command, name, kind)])
    for words in TOGETHER[command]:
        yield Case(command, [*REQUIRED.get(command, []), *words])


CASES = {command: list(cases_of(command)) for command in COMMANDS}


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that check and do nothing more, in an empty folder. `analyze` measures three tensors for a model."""
    for name, command in COMMANDS.items():
        if name != "analyze":
            monkeypatch.setitem(COMMANDS, name, dataclasses.replace(command, run=lambda config: None))
    qkv = torch.randn(3, 8, 1, 4).unbind()

    def measure(model: object, *inputs: object, **settings: Any) -> Any:
        attention_error(qkv, **settings)
        raise Measured

    def load(folder: Path, root: Path | None, device: str) -> Any:
        pick_device(device)
        if folder.name != "run":
            raise FileNotFoundError(2, "no such run", str(folder))
        graph = types.SimpleNamespace(x=None)
        step = types.SimpleNamespace(graph=graph, edges=(), batch=None)
        return types.SimpleNamespace(model=None, judged=[step])

    monkeypatch.setattr(analyze, "attention_error", measure)
    monkeypatch.setattr(analyze, "load_run", load)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Measured(Exception):
    """The settings were good enough to measure with."""


def outcome(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[bool, str]:
    """Whether the words are taken, and what was said on stderr."""
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    if code == 1 and "Measured" in said:
        return True, ""
    assert code in (0, 2), f"{words}: exit code {code}\n{said[-2000:]}"
    return code == 0, said


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_flag_does_not_take_is_refused(command: str, checked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case in CASES[command]:
        shown = [command, *(word[:40] for word in case.words)]
        taken, said = outcome([command, *case.words], capsys)
        assert taken == case.is_taken, f"{shown} is {'taken' if taken else f'refused: {said}'}"
        if not taken:
            by_parser = "For full helptext" in said or said.startswith("usage: ")  # tyro's or argparse's own
            assert by_parser or (said.startswith("randbatch: ") and said.count("\n") == 1), f"{shown}: {said[:2000]}"
            assert "Traceback" not in said
            assert by_parser or len(said) < 800, f"{shown}: {said[:2000]}"
        assert [path.name for path in checked.rglob("*")] == ["run"], f"{shown} made a file"


def test_the_table_is_whole() -> None:
    assert set(TOGETHER) == set(COMMANDS)
    for command, name in itertools.chain(TAKEN, ABSENT):
        assert name in fields_of(command), f"{command} has no {name}"
    assert sum(map(len, CASES.values())) >= 800


GOOD: list[list[str]] = [
    ["train", "--attention", "rba", "full", "--split", "0", "1", "--seed", "-1", "0", str(2**63 - 1)],
    ["train", "--chunk-batches", "auto", "--lr", "1e-3", "--dropout", "0.99", "--device", "cuda:3"],
    ["train", "--dataset", "some.npz", "--preset", "small-graph", "--eval-rounds", "3"],
    ["convergence", "--dt", "0.5", "0.25", "0.125", "--method", "rbmr", "--batch-size", "2", "64"],
    ["convergence", "--dt", "0.1", "0.3", "0.6", "--t1", "0.6"],
    ["convergence", "--system", "softmax", "--batch-size", "4"],
    ["convergence", "--run", "run", "--batch-size", "32", "64", "--realisations", "2", "--root", "data"],
    ["simulate", "--method", "direct"],
    ["simulate", "--system", "wealth", "--t1", "0.3", "--dt", "0.1", "--frames", "4", "--film"],
    ["bench", "--case", "layer", "naive", "--tokens", "256", "128", "--device", "cuda"],
    ["plan", "--nodes", "10000", "--edges", "0", "--memory", "1.5GiB", "--batch-size", "2", "--layers", "0"],
    ["datasets"],
    ["analyze", "run", "--batch-size", "2", "3", "--num-queries", "1", "--max-rounds", "1", "--tolerance", "1e-9"],
]  # fmt: skip


@pytest.mark.parametrize("words", GOOD, ids=" ".join)
def test_what_is_good_is_taken(words: list[str], checked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(words, capsys) == (True, "")


def test_settings_of_the_library_are_checked_too() -> None:
    """Not by the command line alone: who makes the settings in Python is told the same."""
    makers: list[tuple[Callable[[], object], str]] = []
    for command in ("train", "convergence", "simulate", "bench"):
        config = COMMANDS[command].settings
        name = "num_particles" if command in ("convergence", "simulate") else "batch_size"
        makers.append((lambda config=config, name=name: config(**{name: 1}), f"{name} must be at least 2, got 1"))
    for make, message in makers:
        with pytest.raises(ValueError, match=message):
            make()
