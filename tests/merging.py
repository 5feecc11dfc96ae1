"""Softmax attention over given rounds, and the formula that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from randbatch.interactions import Options, Softmax
from randbatch.interactions.rounds import Debias, Projections, merge_rounds
from randbatch.partition import Partition, Partitions


class Listed(Partitions):
    """Rounds that somebody made."""

    def __init__(self, parts: Sequence[Partition]) -> None:
        self.parts = parts
        self.num_tokens = parts[0].num_tokens

    def __iter__(self) -> Iterator[Partition]:
        return iter(self.parts)


def attend_to_met(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rounds: Partitions | Sequence[Partition],
    options: Options,
    debias: Debias,
) -> Tensor:
    """Attention to the tokens that were met, and to the token itself once."""
    if isinstance(rounds, Partition):
        return Softmax().in_batches(rounds, (query, key, value), options, debias)
    rounds = rounds if isinstance(rounds, Partitions) else Listed(rounds)
    return merge_rounds(Softmax(), Projections((query, key, value)), rounds, debias, options)


def qkv(num_tokens: int, *, heads: int = 2, size: int = 6, dtype: torch.dtype = torch.float64, grad: bool = True):
    return [torch.randn(num_tokens, heads, size, dtype=torch.float64).to(dtype).requires_grad_(grad) for _ in range(3)]


def met_matrix(parts, num_tokens: int) -> Tensor:
    met = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for part in parts:
        for block in part.split(part.order):
            for row in block:
                met[row.unsqueeze(1), row] = True
    return met


def by_formula(query: Tensor, key: Tensor, value: Tensor, parts, debias: float, others: Tensor) -> Tensor:
    """The whole matrix of weights, masked and weighted as `randbatch.interactions.rounds` says."""
    met = met_matrix(parts, len(query)).fill_diagonal_(False)
    kappa = others.double() / met.sum(1).clamp(min=1)
    logits = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1])
    logits = logits + (debias * kappa.log()).unsqueeze(1).masked_fill(~met, -torch.inf).fill_diagonal_(0)
    return torch.einsum("hij,jhe->ihe", logits.to(query.dtype).softmax(dim=-1), value)
