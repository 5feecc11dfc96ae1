"""Softmax attention inside random batches in one compiled function on a CPU: gather, attend and scatter, both ways.

It is C++ of vectors, compiled once on the machine that runs it, for that machine's instructions. Without a compiler
there is none of it: `"auto"` then takes torch's own fused attention, about half as fast in heads of 16.
"""

from __future__ import annotations

import torch

from randbatch._compiling import constant
from randbatch.kernels.cpu import ops
from randbatch.kernels.cpu.rows import scatter_rows
from randbatch.kernels.fused import fused
from randbatch.kernels.problem import Problem

__all__ = ["BACKEND", "scatter_rows"]

_MAX_SIZE = 256


def why_not(problem: Problem) -> str | None:
    """fp32, heads of at most 256 numbers, and a C++ compiler with OpenMP."""
    if problem.device.type != "cpu":
        return f"it needs a CPU, got {problem.device.type}"
    if problem.dtype != torch.float32:
        return f"it takes float32, got {problem.dtype}"
    return problem.why_not_of_size(_MAX_SIZE) or _why_not_built(problem.head_size, problem.value_size)


@constant  # torch.compile need not understand how a compiler is called
def _why_not_built(head_size: int, value_size: int) -> str | None:
    return ops.library_for(head_size, value_size).why_not()


BACKEND = fused("cpu", why_not, ops.OPERATORS, auto_on=("cpu",))
