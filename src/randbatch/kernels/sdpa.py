"""torch's fused attention, `scaled_dot_product_attention`, with batches and heads as its leading dimensions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._autograd import pull_back
from randbatch._shapes import Float
from randbatch.kernels import reference
from randbatch.kernels.dense import in_blocks
from randbatch.kernels.problem import Problem

__all__ = ["BACKEND", "attend", "is_linear_memory"]

_flash: Any = torch.ops.aten  # the kernel below SDPA on a CPU; it also returns the log-sum-exp
_HAS_FLASH = hasattr(_flash, "_scaled_dot_product_flash_attention_for_cpu")
_NARROW = 16  # of fewer keys torch's CPU kernel makes 0 of a query that is NaN


def why_not(problem: Problem) -> str | None:
    """Where a log-sum-exp is needed, only torch's CPU kernel gives it, without dropout and for Dv = D."""
    if problem.transformed:
        return problem.why_not_transformed()
    if not (problem.need_lse or problem.exclude_self):
        return None
    if problem.device.type != "cpu":
        return f"on {problem.device.type} it does not return the log-sum-exp that merging needs"
    if problem.dropout_p > 0:
        return "with dropout it does not return the log-sum-exp that merging needs"
    if problem.head_size != problem.value_size:
        return f"with values of size {problem.value_size} and keys of {problem.head_size} it has no fused kernel"
    if not _HAS_FLASH:
        return "this version of torch has no fused kernel on the CPU"
    return None


def is_linear_memory(problem: Problem) -> bool:
    """Whether torch has a kernel here that does not store the logits (flash or memory-efficient)."""
    if problem.device.type == "cpu":
        return problem.head_size == problem.value_size and problem.dropout_p == 0.0
    return problem.head_size == problem.value_size and problem.dtype != torch.float64


_MAX_CUDA_BATCHES = 65_535  # a CUDA grid dimension; more batches do not launch (pytorch/pytorch#146704)


def attend(
    query: Float[Tensor, "m q h d"],
    key: Float[Tensor, "m p h d"],
    value: Float[Tensor, "m p h dv"],
    problem: Problem,
    own_shift: Float[Tensor, "_ h"] | None = None,
) -> tuple[Float[Tensor, "m q h dv"], Float[Tensor, "m q h"] | None]:
    """`softmax_j(scale · q_i·k_j) v_j` inside each batch."""
    if problem.need_lse or problem.exclude_self:  # of which torch has no derivative
        return reference.attend(query, key, value, problem, own_shift)
    if own_shift is not None and own_shift.shape[0] > 1:
        return _attend_by_shift(query, key, value, problem, own_shift), None
    if problem.device.type == "cuda" and query.shape[0] > _MAX_CUDA_BATCHES:
        pieces = zip(*(tensor.split(_MAX_CUDA_BATCHES) for tensor in (query, key, value)), strict=True)
        return torch.cat([attend(q, k, v, problem, own_shift)[0] for q, k, v in pieces]), None
    if problem.device.type == "cpu" and key.shape[1] < _NARROW:
        return reference.attend(query, key, value, replace(problem, need_lse=False), own_shift)[0], None
    if _is_flash(problem) and not torch.compiler.is_compiling() and torch.is_grad_enabled():
        found: Any = _Flash.apply(query, key, value, own_shift, problem)
        return found, None
    mask = None if own_shift is None else _mask_of_shift(own_shift, query.shape[1], query.dtype)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=problem.dropout_p,
        scale=problem.scale,
    )
    return out.transpose(1, 2), None


def _is_flash(problem: Problem) -> bool:
    """Whether SDPA takes its fused kernel on a CPU, which has no second derivative of its own."""
    return _HAS_FLASH and problem.device.type == "cpu" and is_linear_memory(problem)


def _turn(*tensors: Float[Tensor, "m _ h _"]) -> list[Float[Tensor, "m h _ _"]]:
    """Heads before tokens; the kernel below SDPA takes the elements of a head for adjacent without a look."""
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors]


def _mask_of_shift(own_shift: Float[Tensor, "1 h"], width: int, dtype: torch.dtype) -> Float[Tensor, "1 h p p"]:
    return torch.diag_embed(own_shift.to(dtype).unsqueeze(-1).expand(-1, -1, width))


class _Flash(torch.autograd.Function):
    """torch's fused kernel on a CPU; while autograd records backward, the formula in plain torch."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, own_shift: Tensor | None, problem: Problem
    ) -> Tensor:
        turned = _turn(query, key, value)
        mask = None if own_shift is None else _mask_of_shift(own_shift, query.shape[1], query.dtype)
        out, lse = _flash._scaled_dot_product_flash_attention_for_cpu(*turned, attn_mask=mask, scale=problem.scale)
        ctx.save_for_backward(query, key, value, out, lse, own_shift)
        ctx.problem = problem
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse, own_shift = ctx.saved_tensors
        problem = replace(ctx.problem, need_lse=False)
        if torch.is_grad_enabled():

            def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return reference.attend(query, key, value, problem, own_shift)[0]

            return *pull_back(formula, (query, key, value), grads), None, None
        mask = None if own_shift is None else _mask_of_shift(own_shift, query.shape[1], query.dtype)
        turned = _turn(grads[0], query, key, value)
        found = _flash._scaled_dot_product_flash_attention_for_cpu_backward(
            *turned, out, lse, 0.0, False, attn_mask=mask, scale=problem.scale
        )
        return *(tensor.transpose(1, 2) for tensor in found), None, None


def _attend_by_shift(query: Tensor, key: Tensor, value: Tensor, problem: Problem, own_shift: Tensor) -> Tensor:
    """Batches of one shift together, as many calls as there are shifts: each has a mask `[1, H, P, P]`."""
    kinds, kind = torch.unique(own_shift, dim=0, return_inverse=True)
    if len(kinds) == 1:
        return attend(query, key, value, problem, kinds)[0]
    batches = [(kind == number).nonzero().squeeze(1) for number in range(len(kinds))]
    outs = [
        attend(query[rows], key[rows], value[rows], problem, kinds[number : number + 1])[0]
        for number, rows in enumerate(batches)
    ]
    return torch.cat(outs)[torch.cat(batches).argsort()]


def _mask(width: int, problem: Problem) -> Tensor | None:
    if not problem.exclude_self:
        return None
    return torch.zeros(width, width, dtype=problem.dtype).fill_diagonal_(-torch.inf)


def forward(
    query: Float[Tensor, "m p h d"], key: Float[Tensor, "m p h d"], value: Float[Tensor, "m p h dv"], problem: Problem
) -> tuple[Float[Tensor, "m p h dv"], Float[Tensor, "m p h"]]:
    """Without autograd, with the log-sum-exp."""
    if key.shape[1] < _NARROW:
        return reference.forward(query, key, value, problem)
    turned = _turn(query, key, value)
    mask = _mask(query.shape[1], problem)
    out, lse = _flash._scaled_dot_product_flash_attention_for_cpu(*turned, attn_mask=mask, scale=problem.scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def backward(
    grad: Float[Tensor, "m p h dv"],
    query: Float[Tensor, "m p h d"],
    key: Float[Tensor, "m p h d"],
    value: Float[Tensor, "m p h dv"],
    out: Float[Tensor, "m p h dv"],
    lse: Float[Tensor, "m p h"],
    problem: Problem,
) -> tuple[Float[Tensor, "m p h d"], Float[Tensor, "m p h d"], Float[Tensor, "m p h dv"]]:
    """The kernel's own backward; `out` and `lse` may be those of attention over more keys."""
    if key.shape[1] < _NARROW:
        return reference.backward(grad, query, key, value, out, lse, problem)
    turned = _turn(grad, query, key, value, out)
    grads = _flash._scaled_dot_product_flash_attention_for_cpu_backward(
        *turned,
        lse.transpose(1, 2).contiguous(),
        0.0,
        False,
        attn_mask=_mask(query.shape[1], problem),
        scale=problem.scale,
    )
    grad_query, grad_key, grad_value = (tensor.transpose(1, 2) for tensor in grads)
    return grad_query, grad_key, grad_value


BACKEND = in_blocks("sdpa", why_not, attend, forward, backward)
