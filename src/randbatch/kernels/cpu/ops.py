"""The operators of the CPU backend: tensors in torch, their numbers to the library that fits the size of heads."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from randbatch.kernels.backend import Grads
from randbatch.kernels.cpu.build import Library
from randbatch.kernels.cpu.calls import attend_backward, attend_forward
from randbatch.kernels.cpu.trial import whats_wrong
from randbatch.kernels.fused import Batches, define_operators

__all__ = ["OPERATORS", "library_for"]

_LANES = 16  # of the longest vectors, AVX-512's


@cache
def library_for(head_size: int, value_size: int) -> Library:
    """What is compiled for heads of these sizes: few libraries, since each takes a second or two."""
    return _library(*(-(-size // _LANES) * _LANES for size in (head_size, value_size)))


@cache
def _library(size_d: int, size_e: int) -> Library:
    return Library(
        "attention", (f"SIZE_D={size_d}", f"SIZE_E={size_e}"), lambda functions: whats_wrong(functions, size_d, size_e)
    )


def _run_forward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, batches: Batches) -> None:
    functions = library_for(query.shape[2], value.shape[2]).functions()
    attend_forward(functions, query, key, value, out, lse, batches, torch.get_num_threads())


def _run_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: Grads,
    batches: Batches,
) -> None:
    functions = library_for(query.shape[2], value.shape[2]).functions()
    threads = torch.get_num_threads()
    attend_backward(functions, grad, grad_lse, query, key, value, out, lse, grads, batches, threads)


OPERATORS = define_operators("attend_cpu", _run_forward, _run_backward)
