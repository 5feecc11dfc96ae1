"""The command line: `randbatch train`, `analyze`, `convergence`, `simulate`, `bench`, `plan` and `datasets`.

A command's module is imported when the command is asked for, so that the others do not need its packages. Exit codes:
0; 2 for what the user can fix, in one line; 1 for a fault of this package, with its traceback; 130 if interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import randbatch
from randbatch._checks import check_choice
from randbatch._errors import Interrupted, InvalidValue, UserError
from randbatch._memory import is_out_of_memory
from randbatch._optional import require

if TYPE_CHECKING:
    from randbatch.train import SweepConfig

__all__ = ["COMMANDS", "Command", "DatasetsConfig", "list_datasets", "main"]

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_DEBUG = "--debug"


@dataclass(frozen=True)
class Command:
    """A command, which is imported when it is asked for.

    Attributes:
        help: what it does, in a line.
        module: where it is.
        config: the name of its settings, a dataclass whose docstrings are the text of `--help`.
        run: the name of the function that runs it, with the settings as its argument.
        needs: optional packages without which it cannot even start.
    """

    help: str
    module: str
    config: str
    run: str
    needs: tuple[str, ...] = ()


_PICTURES = ("numpy", "matplotlib", "tqdm")

COMMANDS: dict[str, Command] = {
    "train": Command(
        "train graph transformers: one run for each attention, split and seed", "randbatch.train.sweep",
        "SweepConfig", "train_sweep", _PICTURES,
    ),
    "analyze": Command(
        "error of every estimator against exact attention in a trained run", "randbatch.train.analyze",
        "AnalyzeConfig", "analyze_run", _PICTURES,
    ),
    "convergence": Command(
        "errors of random batches at several steps, and the rates that are proved", "randbatch.experiments.convergence",
        "ConvergenceConfig", "run_convergence", _PICTURES,
    ),
    "simulate": Command(
        "a system of particles in time", "randbatch.experiments.simulate", "SimulateConfig", "simulate", _PICTURES
    ),
    "bench": Command(
        "time and memory of attention layers, ours and others", "randbatch.experiments.bench",
        "BenchConfig", "run_bench", _PICTURES,
    ),
    "plan": Command(
        "the batch size that fits into memory", "randbatch.experiments.planning", "PlanConfig", "run_plan"
    ),
    "datasets": Command(
        "the names that train takes", "randbatch.cli", "DatasetsConfig", "list_datasets", ("numpy",)
    ),
}  # fmt: skip
"""Name → command."""


@dataclass(frozen=True)
class DatasetsConfig:
    """List the names that `randbatch train --dataset` takes, and the presets."""


def list_datasets(_: DatasetsConfig) -> None:
    """Print the names."""
    from randbatch.train.config import PRESETS  # needs numpy
    from randbatch.train.data import DATASETS

    print("data sets:", ", ".join(DATASETS))
    print("presets:", ", ".join(PRESETS))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What the user can fix is one line, without a traceback unless `--debug` asks."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _DEBUG in words
    _set_up()
    try:
        code = _run([word for word in words if word != _DEBUG])
        sys.stdout.flush()
    except Interrupted as error:
        print(f"\ninterrupted; go on with: {error.how}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\ninterrupted before anything was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        _drop_output()
        return 141
    except Exception as error:
        return _report(error, debug)
    return code


def _set_up() -> None:
    """What has to be as it is before anything is computed or printed."""
    # huge pages: torch asks when it first takes memory; half of a large step on a CPU is page faults otherwise
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a code page without ± or τ is no reason to stop
            stream.reconfigure(errors="replace")


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"randbatch {randbatch.__version__} (torch {torch.__version__})")
        return 0
    name, *rest = words
    command = COMMANDS[check_choice("the command", name, COMMANDS)]
    _refuse_empty(rest)
    config = _parse(name, command, rest)
    getattr(importlib.import_module(command.module), command.run)(config)
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join([
        "usage: randbatch COMMAND [OPTIONS]",
        "",
        "Attention for very large sets by random batches.",
        "",
        "commands:",
        *(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()),
        "",
        "options:",
        "  -h, --help  this text; after a command, its options",
        "  --version   versions of randbatch and torch",
        f"  {_DEBUG}     the traceback of every error",
    ])  # fmt: skip


def _refuse_empty(words: Sequence[str]) -> None:
    """An empty word is no value of any option; as a path it would be the current folder."""
    before = "an argument"
    for word in words:
        flag, _, value = word.partition("=")
        if not word or (flag != word and flag.startswith("--") and not value):
            raise InvalidValue(f"{flag or before} must not be empty")
        before = word if word.startswith("--") else before


def _parse(name: str, command: Command, words: list[str]) -> Any:
    """The settings; the defaults of `train` are those of the preset, or of the run that is resumed."""
    for package in ("tyro", *command.needs):
        require(package)
    config_class = getattr(importlib.import_module(command.module), command.config)
    if name != "train":
        return _ask_tyro(config_class, name, words)
    from randbatch.train.config import preset

    first = argparse.ArgumentParser(prog="randbatch train", add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="groups")
    first.add_argument("--preset", default=None)
    first.add_argument("--resume", type=Path, default=None)
    first.add_argument("--root", type=Path, default=None)
    named, _ = first.parse_known_args(words)
    if named.resume is None:
        return _ask_tyro(config_class, name, words, default=preset(named.preset, named.dataset))
    from randbatch.train.sweep import load_sweep

    stored = load_sweep(named.resume, named.root)
    config = _ask_tyro(config_class, name, words, default=stored)
    _check_unchanged(config, stored)
    return config


def _ask_tyro(config_class: type[Any], name: str, words: Sequence[str], **default: Any) -> Any:
    """Parse; what the settings refuse is raised, and only what tyro cannot read is told by tyro."""
    tyro = require("tyro")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config_class, prog=f"randbatch {name}", args=words, config=(tyro.conf.PositionalRequiredArgs,)
                if name == "analyze" else (), **default,
            )  # fmt: skip
    except SystemExit as end:
        if isinstance(end.__context__, ValueError):  # of `__post_init__`, which tyro would tell in a box of its own
            raise end.__context__ from None
        text = said.getvalue()
        sys.stderr.write(text if sys.stderr.isatty() else _ESCAPES.sub("", text))
        raise


def _check_unchanged(config: SweepConfig, stored: SweepConfig) -> None:
    """A resumed run keeps its settings.

    It may become longer, unless its learning rate decays over its epochs, and may run elsewhere.
    """
    free = {"root", "device"} if stored.lr_decay else {"root", "device", "epochs"}
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(stored, field.name)
        if field.name not in free and ours != theirs:
            raise InvalidValue(f"{field.name}: {config.resume} was started with {theirs}, it cannot go on with {ours}")


def _report(error: Exception, debug: bool) -> int:
    """Say what went wrong; the exit code."""
    reason = _reason(error)
    if debug or reason is None:
        traceback.print_exception(error)
    if isinstance(error, OSError):
        _drop_output_if_full()
    if reason is None:
        print("randbatch: this is a fault of randbatch; please report it with the lines above", file=sys.stderr)
        return 1
    print(f"randbatch: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _reason(error: Exception) -> str | None:
    """What the user can fix; None: nothing."""
    if is_out_of_memory(error):
        return f"there is not enough memory: {str(error).splitlines()[0] if str(error) else 'take smaller numbers'}"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    return None


def _drop_output_if_full() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """What is still to be printed goes nowhere; Python would try again at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
