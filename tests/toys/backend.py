"""A backend: weights by exponentials that are divided by their sum, and a backward pass by autograd."""

import torch
from torch import Tensor

from randbatch import kernels
from randbatch.kernels.dense import in_blocks


def why_not(problem: kernels.Problem) -> str | None:
    return "it drops no weights" if problem.dropout_p > 0 else None


def _logits(query: Tensor, key: Tensor, problem: kernels.Problem, shift: Tensor | None = None) -> Tensor:
    wide = torch.promote_types(problem.dtype, torch.float32)
    logits = (query.to(wide).transpose(1, 2) @ key.to(wide).permute(0, 2, 3, 1)).transpose(1, 2) * problem.scale
    own = torch.eye(query.shape[1], device=query.device, dtype=wide)[:, None]  # [P, 1, P]
    logits = logits if shift is None else logits + own * shift.to(wide)[:, None, :, None]
    return logits.masked_fill(own > 0, -torch.inf) if problem.exclude_self else logits


def attend(query: Tensor, key: Tensor, value: Tensor, problem: kernels.Problem, shift: Tensor | None = None):
    logits = _logits(query, key, problem, shift)
    top = logits.detach().amax(dim=-1, keepdim=True)
    weights = (logits - top).exp()
    total = weights.sum(dim=-1)
    out = torch.einsum("mqhp,mphe->mqhe", weights, value.to(weights.dtype)) / total.unsqueeze(-1)
    return out.to(problem.dtype), total.log() + top.squeeze(-1)


def backward(grad, query, key, value, out, lse, problem: kernels.Problem):
    with torch.enable_grad():
        q, k, v = (x.to(lse.dtype).detach().requires_grad_() for x in (query, key, value))
        weights = (_logits(q, k, problem) - lse.unsqueeze(-1)).exp()
        moved = torch.einsum("mqhp,mphe->mqhe", weights, v) - weights.sum(dim=-1, keepdim=True) * out
        return tuple(x.to(problem.dtype) for x in torch.autograd.grad((moved * grad).sum(), (q, k, v)))


kernels.register(in_blocks("toy", why_not, attend, attend, backward, stores_logits=True))
