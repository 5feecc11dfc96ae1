"""Backends of the softmax interaction: the same formula, computed in different ways.

Each backend says why it cannot take a problem (`why_not`) and computes it (`attend`). `"auto"` takes the first that
can, in the order of the device; a backend asked for by name that cannot raises with its reason.
"""

from __future__ import annotations

import warnings

import torch

from randbatch._checks import check_choice
from randbatch.kernels import cpu, reference, sdpa, triton
from randbatch.kernels.backend import Backend, OwnShift
from randbatch.kernels.blocks import over_blocks
from randbatch.kernels.problem import Problem

__all__ = ["BACKENDS", "Backend", "OwnShift", "Problem", "over_blocks", "pick_backend"]

BACKENDS = {
    "triton": triton.BACKEND,
    "cpu": cpu.BACKEND,
    "sdpa": sdpa.BACKEND,
    "reference": reference.BACKEND,
}

# on a CPU triton is only interpreted, which is for tests; on a GPU it is not taken until it was verified on one
_AUTO = {"cuda": ("sdpa", "reference"), "cpu": ("cpu", "sdpa", "reference")}
_said: set[str] = set()


def _say_once(problem: Problem) -> None:
    """Where triton could serve and is not taken, how to ask for it."""
    if problem.device.type != "cuda" or _said or torch.compiler.is_compiling():
        return
    if BACKENDS["triton"].why_not(problem) is None:
        _said.add("triton")
        warnings.warn(
            "backend 'auto' does not take 'triton' on a GPU, since its kernels were tested by an interpreter only; run "
            "benchmarks/verify_triton.py there and ask for it by backend='triton'",
            stacklevel=3,
        )


def pick_backend(name: str, problem: Problem) -> Backend:
    """The backend called `name`, or for `"auto"` the first that can take the problem.

    Raises:
        ValueError: the name is unknown, or that backend cannot take this problem.
    """
    if name == "auto":
        _say_once(problem)
        order = (BACKENDS[each] for each in _AUTO.get(problem.device.type, ("sdpa", "reference")))
        return next(backend for backend in order if backend.why_not(problem) is None)
    backend = BACKENDS[check_choice("backend", name, ["auto", *BACKENDS])]
    reason = backend.why_not(problem)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot be used here: {reason}")
    return backend
