"""A ratio: attention whose weights are Gaussians of the distance between query and key."""

from __future__ import annotations

import torch
from torch import Tensor

from randbatch import interactions


@interactions.register("gaussian")
class Gaussian(interactions.Pairwise):
    """`y_i = Σ_j w_ij v_j / Σ_j w_ij` with `w_ij = exp(−|q_i − k_j|² / 2)`."""

    kind = interactions.Kind.RATIO

    def pair(self, block: interactions.Block, query: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        """`log w_ij`."""
        cross = torch.einsum("mqhd,mphd->mqhp", query, key)
        of_query = query.square().sum(dim=-1).unsqueeze(-1)  # [M, P, H, 1]
        of_key = key.square().sum(dim=-1).transpose(1, 2).unsqueeze(1)  # [M, 1, H, P]
        return cross - (of_query + of_key) / 2
