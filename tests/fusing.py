"""What the tests of fused backends are made of: the formula on the whole matrix, and errors against float64."""

import math

import torch
from torch import Tensor

import randbatch as rb

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def qkv(num_tokens: int, size: int = 16, value_size: int = 16, dtype: torch.dtype = FP32, heads: int = 2):
    sizes = (size, size, value_size)
    return [torch.randn(num_tokens, heads, d, dtype=torch.float64).to(dtype).requires_grad_() for d in sizes]


def bias_of(parts: list[rb.Partition], batch: Tensor | None = None, debias: float = 0.0) -> Tensor:
    """What is added to the logits `[N, N]`: −∞ for a pair that does not meet, δ log κ for one that does."""
    num_tokens = parts[0].num_tokens
    met = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for part in parts:
        for block in part.split(part.order):
            for tokens in block:
                met[tokens.unsqueeze(1), tokens] = True
    sizes = torch.full((num_tokens,), num_tokens) if batch is None else torch.bincount(batch)[batch]
    met = met.fill_diagonal_(False)
    kappa = (sizes - 1).clamp(min=1).double() / met.sum(dim=1).clamp(min=1)
    return (debias * kappa.log()).unsqueeze(1).masked_fill(~met, -torch.inf).fill_diagonal_(0)


def dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, factor: Tensor | None = None):
    """Output and log-sum-exp by the formula, in the dtype that it is given; `factor` `[H, N, N]` is dropout's."""
    logits = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1]) + bias.to(query.dtype)
    weights = torch.softmax(logits, dim=-1) * (1 if factor is None else factor.to(query.dtype))
    return torch.einsum("hij,jhe->ihe", weights, value), logits.logsumexp(dim=-1).T


def run(function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of a fixed weighted sum of it."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape).to(inputs[0].dtype).to(dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def assert_as_good(mine: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Errors at most twice those of plain torch in the same dtype."""
    for ours, theirs, exact in zip(mine, plain, truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == exact.shape
        noise = (theirs.double() - exact).norm().item()
        floor = 4 * torch.finfo(theirs.dtype).eps * exact.norm().item()  # of values that are exact by luck
        assert (ours.double() - exact).norm().item() <= max(2 * noise, floor)
