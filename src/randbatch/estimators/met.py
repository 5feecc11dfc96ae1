"""Softmax attention to the tokens that were met in one round or in many, and to oneself once.

`y_i = (κ^δ Σ_{j∈S_i} w_ij v_j + w_ii v_i) / (κ^δ Σ_{j∈S_i} w_ij + w_ii)`, with w_ij = exp(scale · q_i·k_j), S_i the
others that token i met and κ = (n − 1) / |S_i| for a set of n tokens. δ = 0 is plain, δ = 1 debiased; once all were
met, κ = 1 and it is full attention. The rounds go one by one, forward and backward, so that memory does not grow with
their number.

Shape letters: N tokens, H heads, D head size of query and key, Dv of value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from randbatch._shapes import Bool, Float, Int
from randbatch.interactions import Options
from randbatch.kernels import Backend, Problem, pick_backend
from randbatch.partition import Partition

__all__ = ["attend_to_met", "have_met_all", "log_kappa", "merge"]


def attend_to_met(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    rounds: Partition | Iterable[Partition],
    options: Options,
    debias: float | Float[Tensor, " h"],
) -> Float[Tensor, "n h dv"]:
    """The formula above, in the order of `query`; `debias` is δ, one number or one per head.

    Several rounds are iterated once in forward and once in backward; no pair may meet twice in them.
    """
    if query.shape[0] == 0:
        return value.clone()
    if isinstance(rounds, Partition):
        if rounds.set_sizes is None:
            return _attend_once(query, key, value, rounds, options, debias)
        rounds = [rounds]
    problem = Problem.of(query, value, options.scale, options.dropout_p, need_lse=True, exclude_self=True)
    backend = pick_backend(options.backend, problem)
    if problem.dropout_p > 0:
        return _attend_with_dropout(query, key, value, rounds, debias, problem, backend)
    out: Any = _AttendToMet.apply(query, key, value, rounds, debias, problem, backend)
    return out


def _attend_once(
    query: Tensor, key: Tensor, value: Tensor, part: Partition, options: Options, debias: float | Tensor
) -> Tensor:
    """One round of one set: κ is the same for all batches of a width, so a shift of the own logit does it."""
    problem = Problem.of(query, value, options.scale, options.dropout_p)
    backend = pick_backend(options.backend, problem)
    debias = torch.as_tensor(debias, device=query.device, dtype=_wide(query)).expand(query.shape[1])
    outs: list[Tensor] = []
    for q, k, v in zip(*(part.split(part.pack(tensor)) for tensor in (query, key, value)), strict=True):
        kappa = math.log((part.num_tokens - 1) / (q.shape[1] - 1)) if q.shape[1] > 1 else 0.0
        outs.append(backend.attend(q, k, v, problem, -kappa * debias)[0])
    return part.unpack(part.join(outs))


def log_kappa(others: Int[Tensor, "*n"], met: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Log of (n − 1) / |S_i|; 0 for a token that met nobody."""
    return torch.where(met > 0, others.double() / met.clamp(min=1), 1.0).log()


def have_met_all(rounds: Iterable[Partition]) -> Bool[Tensor, " n"]:
    """Which tokens met every other of their set."""
    met = others = None
    for part in rounds:
        met = part.unpack(part.count_met()) + (0 if met is None else met)
        others = part.unpack(part.count_others())
    if met is None or others is None:
        raise ValueError("rounds must hold at least one partition")
    return met == others


def _attend_round(attend: Any, part: Partition, tensors: Iterable[Tensor], problem: Problem) -> tuple[Tensor, Tensor]:
    """One round, in the order of the tensors: output and log-sum-exp, 0 and −inf where a token is alone."""
    outs: list[Tensor] = []
    norms: list[Tensor] = []
    for q, k, v in zip(*(part.split(part.pack(tensor)) for tensor in tensors), strict=True):
        out, lse = (torch.zeros_like(v), None) if q.shape[1] == 1 else attend(q, k, v, problem)
        outs.append(out)
        norms.append(q.new_full(q.shape[:3], -torch.inf, dtype=_wide(q)) if lse is None else lse)
    return part.unpack(part.join(outs)), part.unpack(part.join(norms))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions over different keys as one over all of them."""
    total = torch.logaddexp(lse, more_lse)
    finite = total.clamp(min=torch.finfo(total.dtype).min)  # nobody met in either: weights 0, not nan
    old, new = (lse - finite).exp(), (more_lse - finite).exp()
    return out * old.unsqueeze(-1) + more * new.unsqueeze(-1), total


def _merge_rounds(
    attend: Any, tensors: tuple[Tensor, Tensor, Tensor], rounds: Iterable[Partition], problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """All rounds merged, without oneself: output `[N, H, Dv]`, log-sum-exp `[N, H]`, and log κ `[N]`."""
    out = lse = met = others = None
    for part in rounds:
        more, more_lse = _attend_round(attend, part, tensors, problem)
        now = part.unpack(part.count_met())
        if out is None or lse is None or met is None:
            out, lse, met, others = more, more_lse, now, part.unpack(part.count_others())
        else:
            (out, lse), met = merge(out, lse, more, more_lse), met + now
    if out is None or lse is None or met is None or others is None:
        raise ValueError("rounds must hold at least one partition")
    return out, lse, log_kappa(others, met)


class _AttendToMet(torch.autograd.Function):
    """Each round is computed again in backward from the merged output and log-sum-exp; O(N) is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rounds: Iterable[Partition],
        debias: float | Tensor,
        problem: Problem,
        backend: Backend,
    ) -> Tensor:
        out, lse, kappa = _merge_rounds(backend.forward, (query, key, value), rounds, problem)
        weight = (debias * kappa.unsqueeze(1)).to(lse.dtype)  # δ log κ, [N, 1] or [N, H]
        own = _own_logit(query, key, problem.scale)
        out, lse = merge(out, lse + weight, value, own)
        out = out.to(value.dtype)
        ctx.save_for_backward(query, key, value, out, lse, weight)
        ctx.rounds, ctx.problem, ctx.backend = rounds, problem, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse, weight = ctx.saved_tensors
        (grad,) = grads
        scale = ctx.problem.scale
        own = (_own_logit(query, key, scale) - lse).exp().unsqueeze(-1)  # the weight of oneself
        to_own = own * (grad.to(own.dtype) * (value - out)).sum(dim=-1, keepdim=True) * scale
        totals = [to_own * key, to_own * query, own * grad]
        for part in ctx.rounds:
            packed = (part.split(part.pack(x)) for x in (grad, query, key, value, out, lse - weight))
            pieces = [_backward_of(ctx, *blocks) for blocks in zip(*packed, strict=True)]
            for position, blocks in enumerate(zip(*pieces, strict=True)):
                totals[position] = totals[position] + part.unpack(part.join(blocks))
        return *(total.to(query.dtype) for total in totals), None, None, None, None


def _backward_of(ctx: Any, *blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, query, key, value, *_ = blocks
    if query.shape[1] == 1:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    return ctx.backend.backward(*blocks, ctx.problem)


def _own_logit(query: Tensor, key: Tensor, scale: float) -> Float[Tensor, "n h"]:
    return (query.to(_wide(query)) * key).sum(dim=-1) * scale


def _attend_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rounds: Iterable[Partition],
    debias: float | Tensor,
    problem: Problem,
    backend: Backend,
) -> Tensor:
    """The same by autograd, which keeps the dropped weights of every round."""
    out, lse, kappa = _merge_rounds(backend.attend, (query, key, value), rounds, problem)
    own = _own_logit(query, key, problem.scale)
    kept = F.dropout(torch.ones_like(own), problem.dropout_p).unsqueeze(-1)
    out, _ = merge(out, lse + (debias * kappa.unsqueeze(1)).to(lse.dtype), kept * value, own)
    return out.to(value.dtype)
