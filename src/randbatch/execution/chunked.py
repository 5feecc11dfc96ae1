"""A few random batches at a time, projected, attended and projected again, and all that once more in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from randbatch._numerics import has_no_elements
from randbatch.execution.call import Call
from randbatch.execution.table import UNTRACED_FUNCTION, Strategy
from randbatch.interactions.rounds import mean
from randbatch.partition import Partition
from randbatch.streaming import piece_size, stream

__all__ = ["Chunked"]

_COPIES = 5  # of what a token is: itself, its gradient, what is turned for the kernel, sums; measured 4.8


class Chunked(Strategy):
    """Memory is that of input, output, their gradients and one chunk, whatever N and p.

    One round keeps nothing but its input. Several keep the merged output of the interaction and its log-denominator,
    and project the tokens again in each round; `finish` then runs on all tokens at once.
    """

    name = "chunked"

    def why_not(self, call: Call) -> str | None:
        """It is for calls that ask for it."""
        if call.chunk_batches is None:
            return "chunk_batches is None"
        return "meta and fake tensors have no memory to save" if has_no_elements(call.first) else None

    def run(self, call: Call) -> Tensor:
        """A chunk is a contiguous range of batches."""
        if torch.compiler.is_compiling():  # all but functions are opaque there
            raise NotImplementedError(UNTRACED_FUNCTION)
        projections, interaction, estimator, options = call.projections, call.interaction, call.estimator, call.options
        rounds = call.draw()
        if rounds.num_tokens == 0:
            return projections.finish(interaction.of_nothing(projections.project(*projections.tensors)))
        chunk = piece_size(call.chunk_batches, rounds.first, _bytes_per_token(call, rounds.first.num_slots))
        if rounds.only is None and not interaction.averages:
            return projections.finish(estimator.over_rounds(interaction, projections, rounds, options, chunk))

        def compute(piece: Partition, *rows: Tensor) -> Tensor:
            projected = projections.project(*rows)
            return projections.finish(estimator.in_batches(interaction, projected, piece, options))

        owner = interaction.owner_beside(projections.owner)
        return mean(stream(compute, part, projections.tensors, chunk, owner) for part in rounds.independent())


def _bytes_per_token(call: Call, width: int) -> int:
    """An estimate of what backward holds of each token of a chunk."""
    if call.chunk_batches != "auto":
        return 1
    tokens, projections = call.first, call.projections
    stored = call.interaction.elements_per_token(width, projections.sizes, tokens, call.options)
    return max(tokens.element_size(), 4) * (_COPIES * projections.elements + stored)
