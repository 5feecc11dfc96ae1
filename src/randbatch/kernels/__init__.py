"""Backends of the softmax interaction: the same formula, computed in different ways.

Each backend says why it cannot take a problem (`why_not`) and computes it (`attend`). `"auto"` takes the first that
can, in the order of the table; a backend requested by name that cannot run raises an error that says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

from randbatch._checks import check_choice
from randbatch._errors import InvalidValue
from randbatch._table import Table
from randbatch.kernels import cpu, reference, sdpa, triton
from randbatch.kernels.backend import Backend, OwnShift
from randbatch.kernels.problem import Problem

__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "OwnShift",
    "Problem",
    "pick_backend",
    "register",
    "resolve_backend",
    "why_not",
]

AUTO = "auto"

BACKENDS: Table[Backend] = Table("backend", Backend)
_said: set[str] = set()


def register(backend: Backend) -> Backend:
    """Add a backend to the table, under its own name.

    `"auto"` takes it on the devices in its `auto_on`, where no earlier one can.

    Raises:
        ValueError: the name is taken.
    """
    BACKENDS.add(backend.name, backend)
    return backend


for _backend in (triton.BACKEND, cpu.BACKEND, sdpa.BACKEND, reference.BACKEND):
    register(_backend)


def resolve_backend(backend: str | Backend) -> Backend | None:
    """The backend of a name, or the object itself; None for `"auto"`."""
    if isinstance(backend, str) and backend not in BACKENDS:
        check_choice("backend", backend, [AUTO, *BACKENDS])
        return None
    return BACKENDS.resolve(backend)


def why_not(backend: str | Backend, problem: Problem) -> Iterator[tuple[Backend, str | None]]:
    """The backends in the order in which they are tried, each with the reason why it cannot run.

    It ends with the one that can, whose reason is None.
    """
    named = resolve_backend(backend)
    for each in BACKENDS.values() if named is None else (named,):
        reason = each.why_not_on(problem) if named is None else each.why_not(problem)
        yield each, reason
        if reason is None:
            return


def pick_backend(backend: str | Backend, problem: Problem) -> Backend:
    """The backend of a name, or the first that can take the problem for `"auto"`.

    Raises:
        ValueError: the name is unknown, or that backend cannot take this problem.
    """
    reason = None
    for each, reason in why_not(backend, problem):
        if reason is None:
            return each
        if each.hint is not None and problem.device.type != "cpu":
            _say_once(each, problem)
    raise InvalidValue(f"backend {getattr(backend, 'name', backend)!r} cannot be used here: {reason}")


def _say_once(backend: Backend, problem: Problem) -> None:
    """Where a backend could run and `"auto"` does not take it, how to ask for it."""
    if backend.name in _said or torch.compiler.is_compiling():
        return
    if backend.hint is not None and backend.why_not(problem) is None:
        _said.add(backend.name)
        warnings.warn(backend.hint, stacklevel=3)
