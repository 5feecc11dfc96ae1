"""Derivatives beyond the first, and function transforms: offered through a formula in plain torch, or refused.

A fast backward computes numbers; autograd cannot differentiate them again, and would give a second derivative of zero.
So every fast backward asks here first. While autograd records a backward pass (`create_graph=True`), the gradients are
computed through the formula instead, which is differentiable to every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "is_backward",
    "is_batched",
    "is_dispatched",
    "is_traced",
    "is_transformed",
    "pull_back",
    "refuse_second_derivative",
    "refuse_transforms",
]

_c: Any = torch._C  # pyright: ignore[reportPrivateUsage]  # what torch has no public name for is asked for here alone
_dual: Any = forward_ad


def pull_back(
    formula: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of `formula(*inputs)`, recorded, so that they can be differentiated again.

    Args:
        formula: plain torch, a function of `inputs` alone.
        inputs: tensors; the gradient of one that needs none is None.
        grads: of what `formula` returns, None where there is none.
    """
    with torch.enable_grad():
        # views: two inputs that are one tensor must not be given their sum, each
        own = [x.view_as(x) if x.requires_grad else x for x in inputs]
        outs = formula(*own)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        known = [(out, grad) for out, grad in zip(outs, grads, strict=True) if grad is not None and out.requires_grad]
        wanted = [x for x in own if x.requires_grad]
        if not known or not wanted:
            return [None] * len(own)
        found = iter(
            torch.autograd.grad(
                [out for out, _ in known], wanted, [grad for _, grad in known], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if x.requires_grad else None for x in own]


def refuse_second_derivative(what: str, instead: str) -> None:
    """Raise in a backward pass that autograd records.

    Raises:
        NotImplementedError: `create_graph=True`, or a transform of `torch.func`.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{what} has first derivatives only (create_graph must be False): {instead}")


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (grad, jvp, vmap, …) or forward-mode differentiation is at work.

    Kernels that are not written in torch know nothing of either; then only plain torch gives the right numbers.
    """
    return _c._are_functorch_transforms_active() or _dual._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether `torch.func.vmap` gave every sample an `x` of its own."""
    functorch = _c._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def is_dispatched() -> bool:
    """Whether a mode of torch (fake tensors, tracing, counting) sees every operation."""
    return _c._len_torch_dispatch_stack() > 0


def is_traced() -> bool:
    """Whether `torch.jit.trace` is at work."""
    return _c._get_tracing_state() is not None


def is_backward() -> bool:
    """Whether autograd is at work in this thread: what runs now is computed again, or a hook."""
    return _c._current_graph_task_id() != -1


def refuse_transforms(what: str, instead: str) -> None:
    """Raise where a transform is at work.

    Raises:
        NotImplementedError: inside `torch.func.grad`, `jvp`, `vmap`, …, or `torch.autograd.forward_ad.dual_level`.
    """
    if is_transformed():
        raise NotImplementedError(
            f"{what} cannot run inside torch.func transforms or forward-mode differentiation: {instead}"
        )
