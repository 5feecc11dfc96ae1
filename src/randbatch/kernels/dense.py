"""From functions of dense blocks `[M, P, H, D]` to functions of tokens and a partition.

Batches of equal size are a dense block without padding. What is not fused moves the tokens into batch order, works on
one block for each size, and moves the results back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from randbatch._shapes import Float
from randbatch.kernels.backend import Backend, Grads, OwnShift
from randbatch.kernels.problem import Problem
from randbatch.partition import Partition

__all__ = ["in_blocks"]


AttendBlock = Callable[[Tensor, Tensor, Tensor, Problem, Tensor | None], tuple[Tensor, Tensor | None]]
ForwardBlock = Callable[[Tensor, Tensor, Tensor, Problem], tuple[Tensor, Tensor]]
BackwardBlock = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Problem], tuple[Tensor, Tensor, Tensor]]


def in_blocks(
    name: str,
    why_not: Callable[[Problem], str | None],
    attend_block: AttendBlock,
    forward_block: ForwardBlock,
    backward_block: BackwardBlock,
    *,
    stores_logits: bool = False,
) -> Backend:
    """The backend whose functions are given for one dense block; there `own_shift` is `[M, H]` or `[1, H]`."""

    def attend(
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h dv"],
        part: Partition,
        problem: Problem,
        own_shift: OwnShift | None = None,
    ) -> tuple[Float[Tensor, "n h dv"], Float[Tensor, "n h"] | None]:
        def each(position: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            if _is_lonely(q, problem):
                return _nothing(q, v)
            out, lse = attend_block(q, k, v, problem, None if own_shift is None else own_shift[position])
            return (out,) if lse is None else (out, lse)

        out, *lse = part.map_blocks(each, query, key, value)
        return out, lse[0] if problem.need_lse else None

    def forward(
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h dv"],
        part: Partition,
        problem: Problem,
    ) -> tuple[Float[Tensor, "n h dv"], Float[Tensor, "n h"]]:
        def each(_: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return _nothing(q, v) if _is_lonely(q, problem) else forward_block(q, k, v, problem)

        out, lse = part.map_blocks(each, query, key, value)
        return out, lse

    def backward(
        grad: Float[Tensor, "n h dv"],
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h dv"],
        out: Float[Tensor, "n h dv"],
        lse: Float[Tensor, "n h"],
        part: Partition,
        problem: Problem,
        grads: Grads,
    ) -> None:
        def each(_: int, *block: Tensor) -> tuple[Tensor, ...]:
            if _is_lonely(block[1], problem):
                return tuple(torch.zeros_like(tensor) for tensor in block[1:4])
            grad, query, key, value, out, lse = block
            return backward_block(grad, query, key, value, out, lse, problem)

        tensors = (grad, query, key, value, out, lse)
        for to, found in zip(grads, part.map_blocks(each, *tensors), strict=True):
            to.copy_(found)

    return Backend(name, why_not, attend, forward, backward, stores_logits=stores_logits)


def _is_lonely(query: Tensor, problem: Problem) -> bool:
    """Batches of one token, which may not attend to itself."""
    return problem.exclude_self and query.shape[1] == 1


def _nothing(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.zeros_like(value), query.new_full(query.shape[:3], -torch.inf, dtype=wide)
