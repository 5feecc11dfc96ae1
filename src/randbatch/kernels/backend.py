"""What every backend of the softmax interaction offers: tokens where they stand, and a partition that says who meets.

Shape letters: N tokens, M batches, H heads, D head size of query and key, Dv of value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from randbatch.kernels.problem import Problem
from randbatch.partition import Partition

__all__ = ["Backend", "Grads", "OwnShift"]

OwnShift = Sequence[Tensor]
"""Added to the logit of a token with itself: for each of `Partition.groups` `[rows, H]`, or `[1, H]` for all its rows.
It has no gradient."""

Grads = tuple[Tensor, Tensor, Tensor]
"""Where the gradients of query, key and value are written; adjacent numbers of a head, any strides else."""

Attend = Callable[[Tensor, Tensor, Tensor, Partition, Problem, OwnShift | None], tuple[Tensor, Tensor | None]]
Forward = Callable[[Tensor, Tensor, Tensor, Partition, Problem], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Partition, Problem, Grads], None]


@dataclass(frozen=True)
class Backend:
    """One way to compute softmax attention inside the batches of a partition.

    `why_not(problem)` is None, or the reason why it cannot.

    `attend(query, key, value, partition, problem, own_shift)` takes query and key `[N, H, D]` and value `[N, H, Dv]` in
    token order and returns the output `[N, H, Dv]` and, if `problem.need_lse`, the log-sum-exp of the logits `[N, H]`,
    −∞ (and output 0) for a token without keys. Autograd knows it.

    `forward(query, key, value, partition, problem)` is the same without autograd, without dropout and always with the
    log-sum-exp. `backward(grad, query, key, value, out, lse, partition, problem, grads)` fills `grads` with the
    gradients of query, key and value for weights `exp(logit − lse)`, where `out` and `lse` may be those of attention
    over more keys than the batch holds. So an attention can be computed part by part.
    """

    why_not: Callable[[Problem], str | None]
    attend: Attend
    forward: Forward
    backward: Backward
