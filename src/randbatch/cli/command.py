"""What a command declares of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["PICTURES", "Command"]

PICTURES = ("numpy", "matplotlib", "tqdm")
"""Packages of a command that draws and shows its progress."""

_SettingsT = TypeVar("_SettingsT")


@dataclass(frozen=True)
class Command(Generic[_SettingsT]):
    """A command of the command line.

    Its file imports no optional package at its top, so that `randbatch --help` works without any.

    Attributes:
        name: the word that calls it.
        help: what it does, in a line.
        settings: a dataclass whose field docstrings are the text of `--help`.
        run: does the work; what it returns is not used.
        needs: optional packages without which it cannot start, beside tyro.
        positional: whether settings without a default are given by position. Default: by flags.
        defaults: from the words after the command to settings whose values are the defaults. Default: those of the
            class.
    """

    name: str
    help: str
    settings: type[_SettingsT]
    run: Callable[[_SettingsT], object]
    needs: tuple[str, ...] = ()
    positional: bool = False
    defaults: Callable[[Sequence[str]], _SettingsT] | None = None
