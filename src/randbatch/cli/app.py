"""The entry point: one table of commands, their help, their settings, and how errors are told.

Exit codes: 0; 2 for what the user can fix, in one line; 1 for a fault of this package, with its traceback; 130 after an
interruption; 141 if nobody reads the output.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, get_args

import torch

import randbatch
from randbatch._checks import check_choice
from randbatch._errors import Interrupted, InvalidValue, UserError
from randbatch._memory import is_out_of_memory
from randbatch._optional import require
from randbatch.cli import analyze, bench, convergence, datasets, plan, simulate, train
from randbatch.cli.command import Command
from randbatch.estimators import Estimator
from randbatch.interactions import Interaction
from randbatch.kernels import Backend

__all__ = ["COMMANDS", "main"]

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_DEBUG = "--debug"
_FILES = (train, analyze, convergence, simulate, bench, plan, datasets)

COMMANDS: dict[str, Command[Any]] = {file.COMMAND.name: file.COMMAND for file in _FILES}
"""Name → command, in the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What the user can fix is one line, without a traceback unless `--debug` asks."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _DEBUG in words
    _set_up()
    try:
        code = _run([word for word in words if word != _DEBUG])
        sys.stdout.flush()
    except Interrupted as error:
        print(f"\ninterrupted; resume with: {error.how}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\ninterrupted before anything was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has closed it
        _drop_output()
        return 141
    except Exception as error:
        return _report(error, debug)
    return code


def _set_up() -> None:
    """Set up memory and output before anything is computed or printed."""
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
    command.run(_parse(command, rest))
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


def _parse(command: Command[Any], words: Sequence[str]) -> Any:
    """The settings; what they refuse is raised, and only what tyro cannot read is told by tyro."""
    tyro = require("tyro")
    for package in command.needs:
        require(package)
    options = {} if command.defaults is None else {"default": command.defaults(words)}
    positional = (tyro.conf.PositionalRequiredArgs,) if command.positional else ()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _objects_by_name(tyro):
            return tyro.cli(
                command.settings, prog=f"randbatch {command.name}", args=words, config=positional, **options
            )  # fmt: skip
    except SystemExit as end:
        refusal = _refusal(end)
        if refusal is not None:
            raise refusal from None
        text = said.getvalue()
        sys.stderr.write(text if sys.stderr.isatty() else _ESCAPES.sub("", text))
        raise


def _objects_by_name(tyro: Any) -> Any:
    """On a command line an interaction, an estimator or a backend is given by its name."""
    registry = tyro.constructors.ConstructorRegistry()

    def by_name(info: Any) -> Any:
        kinds = {*get_args(info.type)} - {str}
        if len(kinds) != 1 or not kinds <= {Interaction, Estimator, Backend}:
            return None
        (kind,) = kinds

        def is_one(value: object) -> bool:
            return isinstance(value, (str, kind))

        return tyro.constructors.PrimitiveConstructorSpec(1, "NAME", _first, is_one, _name_of)

    registry.primitive_rule(by_name)
    return registry


def _first(words: list[str]) -> str:
    return words[0]


def _name_of(value: Any) -> list[str]:
    return [getattr(value, "name", value)]


def _refusal(end: SystemExit) -> BaseException | None:
    """The error of the settings themselves, which tyro would show in its own box; None for what tyro cannot read.

    A `ValueError` of the settings is the context of the exit. Below it, one is tyro's own, unless it is a `UserError`.
    """
    error = end.__context__
    if isinstance(error, ValueError):
        return error
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error


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
    """What the user can fix; None for a fault of this package."""
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
    """Discard what is still to be printed; Python would try again when it exits, and fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
