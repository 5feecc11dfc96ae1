"""A sum: sigmoid attention, which does not normalise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from randbatch import interactions


@interactions.register("sigmoid-mean")
class SigmoidMean(interactions.Pairwise):
    """`y_i = 1/n Σ_j σ(q_i·k_j / √D) v_j`, n the size of the whole set."""

    kind = interactions.Kind.SUM

    def pair(self, block: interactions.Block, query: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        """The weight of a pair."""
        logits = torch.einsum("mqhd,mphd->mqhp", query, key) / math.sqrt(query.shape[-1])
        return torch.sigmoid(logits) / block.set_sizes
