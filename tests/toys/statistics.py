"""An interaction that needs to know something of the whole set: keys are centred before they are compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from randbatch import interactions


@interactions.register("centred")
class Centred(interactions.Pairwise):
    """`y_i = Σ_j softmax_j((q_i − m)·(k_j − m) / √D) v_j`, m the mean of the keys of the whole set."""

    kind = interactions.Kind.RATIO
    statistics = ("mean of the keys",)

    def measure(self, sets: interactions.Sets, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        """`m`, one of each set `[G, H, D]`."""
        return (sets.mean(key),)

    def pair(self, block: interactions.Block, query: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        """The logit."""
        mean = block.statistics[0].to(key.dtype).unsqueeze(1)  # [M, 1, H, D]
        return torch.einsum("mqhd,mphd->mqhp", query - mean, key - mean) / math.sqrt(query.shape[-1])
