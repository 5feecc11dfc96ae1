"""The formula in plain torch: any dtype, any device, every option. It keeps the M · H · P² logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._shapes import Float
from randbatch.kernels.dense import in_blocks
from randbatch.kernels.problem import Problem

__all__ = ["BACKEND", "attend"]


def why_not(problem: Problem) -> str | None:
    """The reference takes everything."""
    return None


def _logits(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    logits = torch.einsum("mqhd,mphd->mqhp", query * problem.scale, key)
    if problem.exclude_self:
        own = torch.eye(query.shape[1], dtype=torch.bool, device=query.device)
        logits = logits.masked_fill(own[:, None, :], -torch.inf)
    return logits


def attend(
    query: Float[Tensor, "m q h d"],
    key: Float[Tensor, "m p h d"],
    value: Float[Tensor, "m p h dv"],
    problem: Problem,
    own_shift: Float[Tensor, "_ h"] | None = None,
) -> tuple[Float[Tensor, "m q h dv"], Float[Tensor, "m q h"] | None]:
    """`softmax_j(scale · q_i·k_j) v_j` inside each batch, accumulated in at least fp32."""
    dtype = torch.promote_types(problem.dtype, torch.float32)
    with torch.autocast(problem.device.type, enabled=False):  # autocast would round the products again
        logits = _logits(query.to(dtype), key.to(dtype), problem)
        if own_shift is not None:
            own = own_shift.to(dtype).unsqueeze(-1).expand(-1, -1, query.shape[1])  # [M or 1, H, P]
            logits = logits + torch.diag_embed(own).transpose(1, 2)
        weights = F.dropout(torch.softmax(logits, dim=-1), problem.dropout_p)
        out = torch.einsum("mqhp,mphe->mqhe", weights, value.to(dtype))
        return out.to(problem.dtype), torch.logsumexp(logits, dim=-1) if problem.need_lse else None


def forward(
    query: Float[Tensor, "m p h d"], key: Float[Tensor, "m p h d"], value: Float[Tensor, "m p h dv"], problem: Problem
) -> tuple[Float[Tensor, "m p h dv"], Float[Tensor, "m p h"]]:
    """As `attend`, without autograd, with the log-sum-exp, without dropout."""
    dtype = torch.promote_types(problem.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        logits = _logits(query.to(dtype), key.to(dtype), problem)
        out = torch.einsum("mqhp,mphe->mqhe", torch.softmax(logits, dim=-1), value.to(dtype))
        return out.to(problem.dtype), torch.logsumexp(logits, dim=-1)


def backward(
    grad: Float[Tensor, "m p h dv"],
    query: Float[Tensor, "m p h d"],
    key: Float[Tensor, "m p h d"],
    value: Float[Tensor, "m p h dv"],
    out: Float[Tensor, "m p h dv"],
    lse: Float[Tensor, "m p h"],
    problem: Problem,
) -> tuple[Float[Tensor, "m p h d"], Float[Tensor, "m p h d"], Float[Tensor, "m p h dv"]]:
    """With `a_ij = exp(s_ij − lse_i)`: `ds_ij = a_ij (g_i·v_j − g_i·y_i)`, and from these the three gradients."""
    dtype = torch.promote_types(problem.dtype, torch.float32)
    with torch.autocast(problem.device.type, enabled=False):
        grad, query, key, value, out = (tensor.to(dtype) for tensor in (grad, query, key, value, out))
        weights = (_logits(query, key, problem) - lse.to(dtype).unsqueeze(-1)).exp()
        to_weights = torch.einsum("mqhe,mphe->mqhp", grad, value)
        to_logits = weights * (to_weights - (grad * out).sum(dim=-1, keepdim=True)) * problem.scale
        gradients = (
            torch.einsum("mqhp,mphd->mqhd", to_logits, key),
            torch.einsum("mqhp,mqhd->mphd", to_logits, query),
            torch.einsum("mqhp,mqhe->mphe", weights, grad),
        )
        grad_query, grad_key, grad_value = (tensor.to(problem.dtype) for tensor in gradients)
        return grad_query, grad_key, grad_value


BACKEND = in_blocks("reference", why_not, attend, forward, backward, stores_logits=True)
