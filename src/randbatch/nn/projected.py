"""Projection, attention in random batches, projection on a CPU: one function, a few batches at a time.

A piece of the tokens passes through all three while the cache holds it, so that queries, keys and values of all tokens
are never in memory. Backward projects a piece once more. Kept are the input, the attention and its log-sum-exp.

A GPU has the memory bandwidth to do without, and its fused kernel takes the tokens where they stand.

Shape letters: N tokens, n tokens of a piece, C channels, H heads, D = C / H head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from randbatch._shapes import Float, Int
from randbatch.kernels import Backend, Problem
from randbatch.partition import Partition

__all__ = ["attend_projected", "batches_of_a_piece"]

_BYTES = 2**20  # of queries, keys and values of a piece, for each thread; up to 16 MiB took about the same time
_BATCHES = 4  # of a piece, for each thread, lest one waits for another


def batches_of_a_piece(batch_size: int, channels: int, dtype: torch.dtype) -> int:
    """How many batches are computed at a time."""
    return torch.get_num_threads() * max(_BATCHES, _BYTES // (3 * channels * dtype.itemsize * batch_size))


@dataclass(frozen=True)
class _Attention:
    """What happens between the projections."""

    part: Partition
    num_heads: int
    backend: Backend
    problem: Problem

    def pieces(self, x: Tensor) -> Iterator[tuple[Int[Tensor, " n"], Partition]]:
        return self.part.chunks(batches_of_a_piece(self.part.num_slots, x.shape[1], x.dtype))

    def split(self, x: Float[Tensor, "n c"], parts: int = 1) -> tuple[Float[Tensor, "n h d"], ...]:
        """What stands side by side: query, key and value, and the heads of each."""
        return x.unflatten(1, (parts, self.num_heads, -1)).unbind(1)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        in_weight: Tensor,
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        how: _Attention,
    ) -> tuple[Tensor, ...]:
        result = torch.empty_like(x)
        kept: list[Tensor] = []
        for rows, piece in how.pieces(x):
            query, key, value = how.split(F.linear(x.index_select(0, rows), in_weight, in_bias), 3)
            out, lse = how.backend.forward(query, key, value, piece, how.problem)
            result.index_copy_(0, rows, F.linear(out.flatten(1), out_weight, out_bias))
            kept += out, lse
        return result, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.how = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        how: _Attention = ctx.how
        x, in_weight, in_bias, out_weight, out_bias, *kept = ctx.saved_tensors
        of_x, *of_parameters = ctx.needs_input_grad[:5]
        to_x = torch.empty_like(x) if of_x else None
        totals = [
            torch.zeros_like(parameter) if needed else None
            for parameter, needed in zip((in_weight, in_bias, out_weight, out_bias), of_parameters, strict=True)
        ]
        to_in, to_in_bias, to_out, to_out_bias = totals
        for (rows, piece), out, lse in zip(how.pieces(x), kept[::2], kept[1::2], strict=True):
            rows_of_x, of_result = x.index_select(0, rows), grads[0].index_select(0, rows)
            query, key, value = how.split(F.linear(rows_of_x, in_weight, in_bias), 3)
            (of_out,) = how.split(of_result @ out_weight)
            of_heads = how.backend.backward(of_out, query, key, value, out, lse, piece, how.problem)
            of_projected = torch.cat([each.flatten(1) for each in of_heads], dim=1)
            if to_x is not None:
                to_x.index_copy_(0, rows, of_projected @ in_weight)
            _add(to_in, to_in_bias, of_projected, rows_of_x)
            _add(to_out, to_out_bias, of_result, out.flatten(1))
        return to_x, *totals, None


def _add(to_weight: Tensor | None, to_bias: Tensor | None, grad: Float[Tensor, "n b"], x: Float[Tensor, "n a"]) -> None:
    """The gradients of weight `[b, a]` and bias `[b]` from that of `x` times weight plus bias."""
    if to_weight is not None:
        to_weight.addmm_(grad.mT, x)
    if to_bias is not None:
        to_bias.add_(grad.sum(dim=0))


def attend_projected(
    x: Float[Tensor, "n c"],
    in_weight: Float[Tensor, "c3 c"],
    in_bias: Float[Tensor, " c3"] | None,
    out_weight: Float[Tensor, "c c"],
    out_bias: Float[Tensor, " c"] | None,
    part: Partition,
    num_heads: int,
    backend: Backend,
    problem: Problem,
) -> Float[Tensor, "n c"]:
    """`W_o · concat_h Σ_{j∈C(i)} softmax_j(scale · q_i·k_j) v_j + b_o`, without dropout.

    Args:
        x: `[N, C]` in token order.
        in_weight: `[3C, C]`, of query, key and value.
        in_bias: `[3C]`, or None.
        out_weight: `[C, C]`.
        out_bias: `[C]`, or None.
        part: the batches.
        num_heads: H.
        backend: computes the attention; it must take `problem`.
        problem: what is asked of it.

    Returns:
        `[N, C]` in token order.
    """
    how = _Attention(part, num_heads, backend, problem)
    result: Any = _Projected.apply(x, in_weight, in_bias, out_weight, out_bias, how)
    return result[0]
