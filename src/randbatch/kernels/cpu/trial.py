"""The first results of a library that was just loaded, against the formula in float64.

A compiler is what `$CXX` says it is, with its options; one that takes nan for impossible, say, makes a library that is
wrong by a tenth and says nothing. So both directions are tried, on batches with one token and with more than a block of
them, with the weight of a token with itself shifted and left out, and with a nan.
"""

from __future__ import annotations

import ctypes
import math
from threading import Thread

import torch
from torch import Tensor

from randbatch.kernels.cpu.calls import attend_backward, attend_forward
from randbatch.kernels.fused import Batches

__all__ = ["whats_wrong"]

_GROUPS = ((1, 131), (2, 5), (1, 1))  # (rows, width): more than two blocks of 64 queries and one of 128 keys
_HEADS = 2
_SHIFTS = ((0.0, -0.5), (0.7, -math.inf), (-math.inf, 0.0), (0.3, -math.inf))  # [M, H]; the last batch has one token
_MOST = 1e-5  # error of numbers of size 1; rounding makes at most 1e-6 of it, in heads of 256
_SPOILT = 131  # the position of a query that is nan: the first of the second batch


def whats_wrong(functions: ctypes.CDLL, size_d: int, size_e: int) -> str | None:
    """None if the functions of attention.cpp are right for heads of these sizes.

    They are asked in a thread of their own, which knows nothing of what the caller's is at: autocast, inference mode,
    fake tensors, modes of any kind.
    """
    said: list[str | None] = ["nothing came back"]

    def ask() -> None:
        try:
            said[0] = _compare(functions, size_d - 1, size_e)  # rows that fill their place, and rows that do not
        except Exception as error:  # no function of that name, an error code, no room: whatever it is, it is the reason
            said[0] = f"{type(error).__name__}: {error}"

    thread = Thread(target=ask, name="randbatch-trial")
    thread.start()
    thread.join()
    return said[0]


def _compare(functions: ctypes.CDLL, size_d: int, size_e: int) -> str | None:
    tokens = sum(rows * width for rows, width in _GROUPS)
    sizes = size_d, size_d, size_e, size_e
    query, key, value, grad = (_numbers(seed, tokens, _HEADS, size) for seed, size in enumerate(sizes, 1))
    grad_lse = _numbers(5, tokens, _HEADS)
    order = (torch.arange(tokens, device="cpu") * 17 + 3) % tokens  # 142 tokens: 17 has no factor in common
    query[order[_SPOILT]] = math.nan
    batches = _batches(order, 1 / math.sqrt(size_d))
    out, lse = torch.empty_like(value), torch.empty_like(grad_lse)
    found = [torch.empty_like(x) for x in (query, key, value)]
    attend_forward(functions, query, key, value, out, lse, batches, 1)
    attend_backward(functions, grad, grad_lse, query, key, value, out, lse, (found[0], found[1], found[2]), batches, 1)
    wanted = _formula(query, key, value, grad, grad_lse, batches)
    names = "output", "log-sum-exp", "gradient of query", "gradient of key", "gradient of value"
    for name, mine, right in zip(names, (out, lse, *found), wanted, strict=True):
        same = torch.isclose(mine.double(), right, rtol=0, atol=_MOST, equal_nan=True)
        if not bool(same.all()):
            at = tuple((~same).nonzero()[0].tolist())
            return f"{name} {float(mine[at])} where {float(right[at])} is right, in heads of {size_d} and {size_e}"
    return None


def _numbers(seed: int, *shape: int) -> Tensor:
    """Numbers in [-1, 1] without order, always the same: nothing is drawn from torch's generator."""
    steps = torch.arange(math.prod(shape), dtype=torch.int64, device="cpu")
    return ((steps * steps * 7 + steps * seed + seed) % 251 / 125 - 1).to(torch.float32).view(shape)


def _batches(order: Tensor, scale: float) -> Batches:
    widths = torch.tensor([width for rows, width in _GROUPS for _ in range(rows)], dtype=torch.int64, device="cpu")
    shift = torch.tensor(_SHIFTS, dtype=torch.float32, device="cpu")
    groups = [number for group in _GROUPS for number in group]
    return Batches(order, widths.cumsum(0) - widths, widths, groups, shift, None, scale, 0.0)


def _formula(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, grad_lse: Tensor, batches: Batches
) -> list[Tensor]:
    """Output, log-sum-exp and gradients of query, key and value, batch by batch."""
    inputs = [x.double() for x in (query, key, value, grad, grad_lse)]
    results = [torch.full_like(inputs[at], math.nan) for at in (2, 4, 0, 1, 2)]
    assert batches.shift is not None
    starts = batches.starts.tolist()
    for start, width, shifts in zip(starts, batches.widths.tolist(), batches.shift.double(), strict=True):
        at = batches.order[start : start + width]
        q, k, v, g, of_lse = (x[at].transpose(0, 1) for x in inputs)  # [H, P, …]
        logits = torch.baddbmm(torch.diag_embed(shifts.unsqueeze(1).expand(-1, width)), q, k.mT, alpha=batches.scale)
        lse = logits.logsumexp(2)
        weights = (logits - lse.unsqueeze(2)).exp()
        weights[lse.isneginf()] = 0  # a token without keys
        y = weights @ v
        slopes = weights * (g @ v.mT - ((g * y).sum(2) - of_lse).unsqueeze(2)) * batches.scale
        slopes[(shifts.isneginf()).unsqueeze(1).expand(-1, width).diag_embed()] = 0
        for result, found in zip(results, (y, lse, slopes @ k, slopes.mT @ q, weights.mT @ g), strict=True):
            result[at] = found.transpose(0, 1)
    return results
