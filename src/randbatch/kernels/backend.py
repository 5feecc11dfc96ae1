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

Attend = Callable[..., tuple[Tensor, Tensor | None]]
Forward = Callable[[Tensor, Tensor, Tensor, Partition, Problem], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Partition, Problem, Grads], None]


@dataclass(frozen=True)
class Backend:
    """One way to compute softmax attention inside the batches of a partition.

    Attributes:
        name: how options and messages call it.
        why_not: from a problem to None, or to the reason why it cannot be computed.
        attend: from query and key `[N, H, D]` and value `[N, H, Dv]` in token order, a partition, a problem and
            (default: None) an own shift to the output `[N, H, Dv]` and, if `problem.need_lse`, the log-sum-exp of the
            logits `[N, H]`, −∞ (and output 0) for a token without keys. Autograd knows it.
        forward: the same without an own shift, without autograd, without dropout, always with the log-sum-exp.
        backward: from grad, query, key, value, out, lse, partition, problem, grads; it fills `grads` with the gradients
            of query, key and value for weights `exp(logit − lse)`, where `out` and `lse` may be those of attention over
            more keys than the batch holds. So attention can be computed part by part.
        auto_on: types of the devices on which `"auto"` takes it; None for every device.
        stores_logits: whether the P² logits of a batch are stored.
        hint: said once where it could run and `"auto"` does not take it.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    attend: Attend
    forward: Forward
    backward: Backward
    auto_on: tuple[str, ...] | None = None
    stores_logits: bool = False
    hint: str | None = None

    def why_not_on(self, problem: Problem) -> str | None:
        """Why `"auto"` does not take it."""
        if self.auto_on is not None and problem.device.type not in self.auto_on:
            return f"'auto' does not take it on {problem.device.type}"
        return self.why_not(problem)
