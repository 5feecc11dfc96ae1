"""Backends that gather, attend and scatter in one kernel: two custom operators of torch around what runs it.

torch sees operators with known shapes and a derivative, so that eager mode, `torch.compile` and autograd all take them.

Shape letters: N tokens, M batches, H heads, D head size of query and key, E of value. `groups` lists rows and width of
each batch size one after the other, `[rows, width, rows, width, …]`, widest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from randbatch._autograd import is_dispatched, pull_back, refuse_second_derivative
from randbatch._shapes import Float, Int
from randbatch.kernels import reference
from randbatch.kernels.backend import Backend, Grads, OwnShift
from randbatch.kernels.problem import Problem
from randbatch.partition import Partition

__all__ = ["Batches", "Operators", "define_operators", "fused"]

_BATCHES = "Tensor order, Tensor starts, Tensor widths, SymInt[] groups"
_OPTIONS = "Tensor? shift, Tensor? seed, float scale, float dropout_p"


@dataclass(frozen=True)
class Batches:
    """Who meets, and how: what the kernels are told beside the tokens.

    Attributes:
        order: int64 `[N]`, the token at each position of batch order.
        starts: int64 `[M]`, where each batch begins in `order`.
        widths: int64 `[M]`, how many tokens it has.
        groups: the same widths, as numbers.
        shift: fp32 `[M, H]`, added to the logit of a token with itself; −∞ leaves it out. None is 0.
        seed: int64 `[1]`, of the dropped weights; None without dropout.
        scale: factor of the logits.
        dropout_p: probability that a weight is dropped.
    """

    order: Int[Tensor, " n"]
    starts: Int[Tensor, " m"]
    widths: Int[Tensor, " m"]
    groups: Sequence[int]
    shift: Float[Tensor, "m h"] | None
    seed: Int[Tensor, " 1"] | None
    scale: float
    dropout_p: float


RunForward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Batches], None]
"""`(query, key, value, out, lse, batches)`: fills out `[N, H, E]` and the fp32 log-sum-exp `[N, H]`, both dense."""

RunBackward = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Grads, Batches], None]
"""`(grad, grad_lse, query, key, value, out, lse, grads, batches)`: fills the gradients of query, key and value, for
weights `exp(logit − lse)`; out and lse may be those of attention over more keys. No gradient of lse is 0."""


@dataclass(frozen=True)
class Operators:
    """`attend(query, key, value, *batches)` → out, lse; `backward(grad, grad_lse, query, …, lse, *batches)`.

    `attend_now` is the first as a plain function: what torch does around an operator takes as long as a small call.
    `fill_gradients` is the second as a plain function of eager mode, which writes into tensors that there are.
    """

    attend: Any
    attend_now: Callable[..., tuple[Tensor, Tensor]]
    backward: Any
    fill_gradients: Callable[..., None]


def _dense(x: Tensor) -> Tensor:
    """The kernels take any stride of tokens and heads, not of the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def define_operators(name: str, run_forward: RunForward, run_backward: RunBackward) -> Operators:
    """The operators `randbatch::NAME` and `randbatch::NAME_backward`. Tensors of tokens are in token order."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *batches: Any) -> tuple[Tensor, Tensor]:
        out = value.new_empty(value.shape)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        run_forward(_dense(query), _dense(key), _dense(value), out, lse, Batches(*batches))
        return out, lse

    def attend_fake(query: Tensor, key: Tensor, value: Tensor, *batches: Any) -> tuple[Tensor, Tensor]:
        return value.new_empty(value.shape), query.new_empty(query.shape[:2], dtype=torch.float32)

    def fill_gradients(
        grads: Grads,
        grad: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *batches: Any,
    ) -> None:
        to_lse = None if grad_lse is None else grad_lse.contiguous()
        tensors = _dense(grad), to_lse, _dense(query), _dense(key), _dense(value), out.contiguous(), lse.contiguous()
        run_backward(*tensors, grads, Batches(*batches))

    def backward(
        grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        fill_gradients(grads, grad, grad_lse, query, key, value, *rest)
        return grads

    def backward_fake(
        grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, groups, shift, seed, scale, dropout_p = inputs
        query, key, value, *batches = tensors
        ctx.save_for_backward(query, key, value, *output, *batches, shift, seed)
        ctx.options = groups, scale, dropout_p

    def differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, shift, seed = ctx.saved_tensors
        groups, scale, dropout_p = ctx.options
        if torch.is_grad_enabled():
            query, key, value, _, _, order, starts, widths = tensors
            batches = Batches(order, starts, widths, groups, shift, seed, scale, dropout_p)
            return *_differentiate_again((query, key, value), (grad, grad_lse), batches), *(8 * [None])
        grads = operators.backward(grad, grad_lse, *tensors, groups, shift, seed, scale, dropout_p)
        return *grads, *(8 * [None])

    qkv = "Tensor query, Tensor key, Tensor value"
    operators = Operators(
        torch.library.custom_op(
            f"randbatch::{name}",
            attend,
            mutates_args=(),
            schema=f"({qkv}, {_BATCHES}, {_OPTIONS}) -> (Tensor, Tensor)",
        ),
        attend,
        torch.library.custom_op(
            f"randbatch::{name}_backward",
            backward,
            mutates_args=(),
            schema=(
                f"(Tensor grad, Tensor? grad_lse, {qkv}, Tensor out, Tensor lse, {_BATCHES}, {_OPTIONS})"
                " -> (Tensor, Tensor, Tensor)"
            ),
        ),
        fill_gradients,
    )
    operators.attend.register_fake(attend_fake)
    operators.attend.register_autograd(differentiate, setup_context=save)
    operators.backward.register_fake(backward_fake)
    return operators


def _is_eager(*tensors: Tensor) -> bool:
    """Whether nothing but the output is wanted: no gradient, no compiler, no mode that sees operators."""
    if torch.compiler.is_compiling() or is_dispatched():
        return False
    recorded = torch.is_grad_enabled()
    for x in tensors:
        if (type(x) is not Tensor and type(x) is not Parameter) or (recorded and x.requires_grad):
            return False
    return True


def _batches(part: Partition) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    starts, widths = part.starts_and_widths()
    return part.order, starts, widths, [number for group in part.groups for number in group]


def _shift(query: Tensor, part: Partition, problem: Problem, own_shift: OwnShift | None) -> Tensor | None:
    """Fp32 `[M, H]`; a token that does not attend to itself has −∞ there."""
    shape = part.num_batches, query.shape[1]
    if problem.exclude_self:
        return query.new_full(shape, -torch.inf, dtype=torch.float32)
    if own_shift is None:
        return None
    if not torch.compiler.is_compiling():
        pairs = zip(own_shift, part.groups, strict=True)
        return torch.cat([shift.expand(rows, -1) for shift, (rows, _) in pairs]).to(torch.float32)
    # traced is one set alone, whose numbers of batches may be symbols: an expansion would keep one of them from being 1
    shift = torch.cat(list(own_shift)).to(torch.float32)
    counts = torch.tensor([rows for rows, _ in part.groups]).to(shift.device, non_blocking=True)
    return shift.repeat_interleave(counts, 0, output_size=part.num_batches)


def _differentiate_again(
    inputs: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor | None, Tensor | None], batches: Batches
) -> list[Tensor | None]:
    """The gradients while autograd records them, by the formula in plain torch."""
    if batches.dropout_p > 0:
        refuse_second_derivative("attention with dropout in a fused kernel", "use backend 'reference', or no dropout")
    query, _, value = inputs
    pairs = tuple(zip(batches.groups[::2], batches.groups[1::2], strict=True))
    part = Partition(batches.order, pairs, is_checked=True)
    shift = batches.shift
    alone = shift is not None and bool(shift.isneginf().all())
    problem = Problem.of(query, value, batches.scale, need_lse=True, exclude_self=alone)
    own_shift = None if shift is None or alone else shift.split(list(batches.groups[::2]))

    def formula(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.BACKEND.attend(query, key, value, part, problem, own_shift)
        assert lse is not None  # it was asked for
        return out, lse

    return pull_back(formula, inputs, grads)


def fused(
    name: str,
    why_not: Callable[[Problem], str | None],
    operators: Operators,
    *,
    auto_on: tuple[str, ...] | None = None,
    hint: str | None = None,
) -> Backend:
    """The backend that these operators make. Dropout draws its seed from torch's default generator."""

    def why_not_here(problem: Problem) -> str | None:
        return problem.why_not_transformed() or why_not(problem)

    def attend(
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h dv"],
        part: Partition,
        problem: Problem,
        own_shift: OwnShift | None = None,
    ) -> tuple[Float[Tensor, "n h dv"], Float[Tensor, "n h"] | None]:
        seed = None
        if problem.dropout_p > 0:  # on the CPU, where activation checkpointing replays it
            seed = torch.randint(2**63 - 1, (1,), device="cpu").to(query.device, non_blocking=True)
        shift = _shift(query, part, problem, own_shift)
        batches = *_batches(part), shift, seed, problem.scale, problem.dropout_p
        compute = operators.attend_now if _is_eager(query, key, value) else operators.attend
        out, lse = compute(query, key, value, *batches)
        return out, lse if problem.need_lse else None

    def forward(
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h dv"],
        part: Partition,
        problem: Problem,
    ) -> tuple[Float[Tensor, "n h dv"], Float[Tensor, "n h"]]:
        batches = *_batches(part), _shift(query, part, problem, None), None, problem.scale, 0.0
        with torch.no_grad():
            compute = operators.attend_now if _is_eager(query, key, value) else operators.attend
            return compute(query, key, value, *batches)

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
        shift = _shift(query, part, problem, None)
        args = (grad, None, query, key, value, out, lse, *_batches(part), shift, None, problem.scale, 0.0)
        operators.fill_gradients(grads, *args)

    return Backend(name, why_not_here, attend, forward, backward, auto_on, hint=hint)
