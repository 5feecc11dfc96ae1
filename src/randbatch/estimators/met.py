"""Softmax attention to the tokens that were met in one round or in many, and to oneself once.

`y_i = (κ^δ Σ_{j∈S_i} w_ij v_j + w_ii v_i) / (κ^δ Σ_{j∈S_i} w_ij + w_ii)`, with w_ij = exp(scale · q_i·k_j), S_i the
others that token i met and κ = (n − 1) / |S_i| for a set of n tokens. δ = 0 is plain, δ = 1 debiased; once all were
met, κ = 1 and it is full attention. The rounds go one by one, forward and backward, so that memory does not grow with
their number.

Shape letters: N tokens, H heads, D head size of query and key, Dv of value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._autograd import pull_back
from randbatch._shapes import Bool, Float, Int
from randbatch.interactions import Options
from randbatch.kernels import BACKENDS, Backend, OwnShift, Problem, pick_backend
from randbatch.partition import Partition

__all__ = ["attend_to_met", "have_met_all", "log_kappa", "merge", "own_logit"]


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
        return _attend_once(query, key, value, rounds, options, debias)
    problem = Problem.of(query, value, options.scale, options.dropout_p, need_lse=True, exclude_self=True)
    backend = pick_backend(options.backend, problem)
    if problem.dropout_p > 0 or problem.transformed:
        return _attend_by_autograd(query, key, value, rounds, debias, problem, backend)
    out: Any = _AttendToMet.apply(query, key, value, rounds, debias, problem, backend)
    return out


def _attend_once(
    query: Tensor, key: Tensor, value: Tensor, part: Partition, options: Options, debias: float | Tensor
) -> Tensor:
    """One round: κ is the same for all tokens of a batch, so a shift of the own logit does it."""
    problem = Problem.of(query, value, options.scale, options.dropout_p)
    debias = torch.as_tensor(debias, device=query.device, dtype=_wide(query)).expand(query.shape[1])
    backend = pick_backend(options.backend, problem)
    return backend.attend(query, key, value, part, problem, _own_shift(part, debias))[0]


def _own_shift(part: Partition, debias: Float[Tensor, " h"]) -> OwnShift:
    """−δ log κ, for each batch, or for all of a width where there is one set."""
    if part.set_of_batch is None or part.set_sizes is None:
        width = torch.tensor([width for _, width in part.groups]).to(debias.device, non_blocking=True)
        kappa = log_kappa(torch.full_like(width, part.set_size - 1), width - 1)
        rows = [1] * len(part.groups)
    else:
        kappa = log_kappa(part.set_sizes[part.set_of_batch] - 1, part.starts_and_widths()[1] - 1)
        rows = [rows for rows, _ in part.groups]
    return (-kappa.to(debias.dtype).unsqueeze(1) * debias).split(rows)


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


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions over different keys as one over all of them; where both lse are −∞ (nobody was met) weights are 0.

    Written out, since the second derivative of `logaddexp` is NaN where its arguments are far apart.
    """
    info = torch.finfo(lse.dtype)
    top = torch.maximum(lse, more_lse).detach().clamp(min=info.min)  # the result does not depend on it
    old, new = (lse - top).exp(), (more_lse - top).exp()
    total = (old + new).clamp(min=info.tiny)
    merged = out * (old / total).unsqueeze(-1) + more * (new / total).unsqueeze(-1)
    return merged, top + total.log()


def _merge_rounds(
    attend: Any, tensors: tuple[Tensor, Tensor, Tensor], rounds: Iterable[Partition], problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """All rounds merged, without oneself: output `[N, H, Dv]`, log-sum-exp `[N, H]`, and log κ `[N]`."""
    out = lse = met = others = None
    for part in rounds:
        more, more_lse = attend(*tensors, part, problem)
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
        own = own_logit(query, key, problem.scale)
        out, lse = merge(out, lse + weight, value, own)
        out = out.to(value.dtype)
        ctx.save_for_backward(query, key, value, out, lse, weight)
        ctx.rounds, ctx.debias, ctx.problem, ctx.backend = rounds, debias, problem, backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse, weight = ctx.saved_tensors
        if torch.is_grad_enabled():

            def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                how = ctx.rounds, ctx.debias, ctx.problem, BACKENDS["reference"]
                return _attend_by_autograd(query, key, value, *how)

            return *pull_back(formula, (query, key, value), grads), None, None, None, None
        (grad,) = grads
        scale = ctx.problem.scale
        own = (own_logit(query, key, scale) - lse).exp().unsqueeze(-1)  # the weight of oneself
        to_own = own * (grad.to(own.dtype) * (value - out)).sum(dim=-1, keepdim=True) * scale
        totals = [to_own * key, to_own * query, own * grad]
        more = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        for part in ctx.rounds:
            ctx.backend.backward(grad, query, key, value, out, lse - weight, part, ctx.problem, more)
            totals = [total + gradient for total, gradient in zip(totals, more, strict=True)]
        return *(total.to(query.dtype) for total in totals), None, None, None, None


def own_logit(query: Tensor, key: Tensor, scale: float) -> Float[Tensor, "n h"]:
    """The logit of each token with itself, in at least fp32."""
    return (query.to(_wide(query)) * key).sum(dim=-1) * scale


def _attend_by_autograd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rounds: Iterable[Partition],
    debias: float | Tensor,
    problem: Problem,
    backend: Backend,
) -> Tensor:
    """The same by autograd, which keeps the weights of every round: with dropout, and for every derivative."""

    def attend(query: Tensor, key: Tensor, value: Tensor, part: Partition, problem: Problem) -> Any:
        return backend.attend(query, key, value, part, problem, None)

    out, lse, kappa = _merge_rounds(attend, (query, key, value), rounds, problem)
    own = own_logit(query, key, problem.scale)
    own_value = value
    if problem.dropout_p > 0:
        own_value = F.dropout(torch.ones_like(own), problem.dropout_p).unsqueeze(-1) * value
    out, _ = merge(out, lse + (debias * kappa.unsqueeze(1)).to(lse.dtype), own_value, own)
    return out.to(value.dtype)
