"""torch's fused attention, `scaled_dot_product_attention`, with batches and heads as its leading dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._shapes import Float
from randbatch.kernels.problem import Problem


def why_not(problem: Problem) -> str | None:
    """SDPA gives no log-sum-exp, which merging rounds needs."""
    if problem.need_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp that merging rounds needs"
    return None


def is_linear_memory(problem: Problem) -> bool:
    """Whether torch has a kernel here that does not store the logits (flash or memory-efficient)."""
    if problem.device.type == "cpu":
        return problem.head_size == problem.value_size and problem.dropout_p == 0.0
    return problem.head_size == problem.value_size and problem.dtype != torch.float64


_MAX_CUDA_BATCHES = 65_535  # a CUDA grid dimension; more batches do not launch (pytorch/pytorch#146704)


def attend(
    query: Float[Tensor, "m q h d"], key: Float[Tensor, "m p h d"], value: Float[Tensor, "m p h dv"], problem: Problem
) -> tuple[Float[Tensor, "m q h dv"], None]:
    """`softmax_j(scale · q_i·k_j) v_j` inside each batch."""
    if problem.device.type == "cuda" and query.shape[0] > _MAX_CUDA_BATCHES:
        pieces = zip(*(tensor.split(_MAX_CUDA_BATCHES) for tensor in (query, key, value)), strict=True)
        return torch.cat([attend(q, k, v, problem)[0] for q, k, v in pieces]), None
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        dropout_p=problem.dropout_p,
        scale=problem.scale,
    )
    return out.transpose(1, 2), None
