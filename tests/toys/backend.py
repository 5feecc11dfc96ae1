"""A backend: weights by exponentials that are divided by their sum, and a backward pass by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from randbatch import kernels
from randbatch.kernels.dense import in_blocks


def why_not(problem: kernels.Problem) -> str | None:
    return "it drops no weights" if problem.dropout_p > 0 else None


def _logits(query: Tensor, key: Tensor, problem: kernels.Problem, shift: Tensor | None = None) -> Tensor:
    own = torch.eye(query.shape[1], device=query.device, dtype=query.dtype)[:, None]  # [P, 1, P]
    logits = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).transpose(1, 2) * problem.scale
    logits = logits if shift is None else logits + own * shift.to(own.dtype)[:, None, :, None]
    return logits.masked_fill(own > 0, -torch.inf) if problem.exclude_self else logits


def attend(query: Tensor, key: Tensor, value: Tensor, problem: kernels.Problem, shift: Tensor | None = None):
    query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
    logits = _logits(query, key, problem, shift)
    top = logits.detach().amax(dim=-1, keepdim=True)
    weights = (logits - top).exp()
    out = torch.einsum("mqhp,mphe->mqhe", weights, value) / weights.sum(dim=-1, keepdim=True)
    return out.to(problem.dtype), weights.sum(dim=-1).log() + top.squeeze(-1)


def backward(grad, query, key, value, out, lse, problem: kernels.Problem):
    with torch.enable_grad():
        wide = [
            x.to(torch.promote_types(x.dtype, torch.float32)).detach().requires_grad_() for x in (query, key, value)
        ]
        weights = (_logits(*wide[:2], problem) - lse.unsqueeze(-1)).exp()
        moved = torch.einsum("mqhp,mphe->mqhe", weights, wide[2]) - weights.sum(dim=-1, keepdim=True) * out
        return tuple(x.to(problem.dtype) for x in torch.autograd.grad((moved * grad).sum(), wide))


kernels.register(in_blocks("toy", why_not, attend, attend, backward, stores_logits=True))
