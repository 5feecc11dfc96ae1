"""Softmax attention over given rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
