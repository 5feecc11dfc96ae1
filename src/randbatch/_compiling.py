"""What `torch.compile` is told, at no cost where nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constant"]

_F = TypeVar("_F", bound=Callable[..., object])


def constant(function: _F) -> _F:
    """Mark a function as one that is called while it is traced, and whose result is then a constant of the program.

    As `torch.compiler.assume_constant_result`, which imports the whole compiler, a second or two, only to set this
    attribute (torch 2.0 to 2.13); `tests/test_compile.py` fails where a later torch reads another one.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function
