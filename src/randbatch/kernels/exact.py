"""Exact softmax attention inside given batches, without holding more than a chunk of the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from randbatch._autograd import refuse_transforms
from randbatch._shapes import Float
from randbatch.kernels import reference, sdpa
from randbatch.kernels.problem import Problem
from randbatch.partition import Partition

__all__ = ["attend_exactly"]

_CHUNK_LOGITS = 2**24  # held at a time: 64 MiB in fp32


def attend_exactly(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    whole: Partition,
    problem: Problem,
    chunk_size: int | None = None,
) -> Float[Tensor, "n h dv"]:
    """Attention in every batch of `whole`, `chunk_size` queries of each at a time.

    Where torch has a kernel that does not store the logits, it is used, unless `chunk_size` is given. Elsewhere the
    logits of a chunk are computed again in backward. The backend of a problem has no say: a batch is a whole set here.
    """
    if problem.transformed:
        if chunk_size is not None:
            refuse_transforms("chunk_size", "leave it out")
        chunk_size = whole.num_tokens
    blocks = zip(*(whole.split(whole.pack(tensor)) for tensor in (query, key, value)), strict=True)
    return whole.unpack(whole.join([_attend(q, k, v, problem, chunk_size) for q, k, v in blocks]))


def _attend(query: Tensor, key: Tensor, value: Tensor, problem: Problem, chunk_size: int | None) -> Tensor:
    """Attention inside each of `[M, P, H, D]`."""
    attend = reference.attend if problem.transformed else sdpa.attend
    num_batches, width, num_heads, _ = query.shape
    if chunk_size is None:
        if sdpa.is_linear_memory(problem):
            return attend(query, key, value, problem, None)[0]
        chunk_size = max(1, _CHUNK_LOGITS // (num_batches * width * num_heads))
    if chunk_size >= width:
        return attend(query, key, value, problem, None)[0]

    def attend_chunk(chunk: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(chunk, key, value, problem, None)[0]

    chunks = [checkpoint(attend_chunk, chunk, key, value, use_reentrant=False) for chunk in query.split(chunk_size, 1)]
    return torch.cat(chunks, dim=1)
