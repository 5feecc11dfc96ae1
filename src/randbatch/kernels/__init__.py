"""Backends of the softmax interaction: the same formula, computed in different ways.

Each backend says why it cannot take a problem (`why_not`) and computes it (`attend`). `"auto"` takes the first of
`BACKENDS` that can; a backend asked for by name that cannot raises with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from randbatch._checks import check_choice
from randbatch.kernels import reference, sdpa
from randbatch.kernels.problem import Problem

__all__ = ["BACKENDS", "Backend", "Problem", "pick_backend"]

Attend = Callable[[Tensor, Tensor, Tensor, Problem, Tensor | None], tuple[Tensor, Tensor | None]]
Forward = Callable[[Tensor, Tensor, Tensor, Problem], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Problem], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """One way to compute softmax attention inside the batches.

    `attend(query, key, value, problem, own_shift)` takes query and key `[M, P, H, D]` and value `[M, P, H, Dv]` and
    returns the output `[M, P, H, Dv]` and, if `problem.need_lse`, the log-sum-exp of the logits `[M, P, H]`. Autograd
    knows it. `own_shift` `[H]` is added to the logit of a token with itself; None is 0.

    `forward` is the same without autograd, and always with the log-sum-exp. `backward(grad, query, key, value, out,
    lse, problem)` returns the gradients of query, key and value for weights `exp(logit − lse)`, where `out` and `lse`
    may be those of attention over more keys than the batch holds. So an attention can be computed part by part.
    """

    why_not: Callable[[Problem], str | None]
    attend: Attend
    forward: Forward
    backward: Backward


BACKENDS = {
    "sdpa": Backend(sdpa.why_not, sdpa.attend, sdpa.forward, sdpa.backward),
    "reference": Backend(reference.why_not, reference.attend, reference.forward, reference.backward),
}


def pick_backend(name: str, problem: Problem) -> Backend:
    """The backend called `name`, or for `"auto"` the first that can take the problem.

    Raises:
        ValueError: the name is unknown, or that backend cannot take this problem.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if backend.why_not(problem) is None)
    backend = BACKENDS[check_choice("backend", name, ["auto", *BACKENDS])]
    reason = backend.why_not(problem)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot be used here: {reason}")
    return backend
