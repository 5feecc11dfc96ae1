"""Rows of a tensor in another order, and back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["permute", "take_rows"]

_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # by their bytes


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """`x[order]`; short rows go as one number each, which on a CPU is five times faster than row by row."""
    size = math.prod(x.shape[1:]) * x.element_size()
    number = _NUMBERS.get(size)
    fits = x.dim() > 1 and x.is_contiguous() and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if number is None or not fits or x.storage_offset() * x.element_size() % size:
        return x.index_select(0, order)
    return x.flatten(1).view(number).squeeze(1).index_select(0, order).unsqueeze(1).view(x.dtype).view(-1, *x.shape[1:])


class _Permute(torch.autograd.Function):
    """`x[order]` whose backward is `grad[inverse]`; each is the other's derivative, to every order."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return take_rows(x, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return permute(grads[0], inverse, order), None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    permuted: Any = _Permute.apply(x, order, inverse)
    return permuted
