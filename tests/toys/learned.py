"""An interaction with a parameter: softmax attention at a temperature that is learned, one for each layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from randbatch import interactions


@interactions.register("tempered")
class Tempered(interactions.Pairwise, nn.Module):
    """`y_i = Σ_j softmax_j(e^t q_i·k_j / √D) v_j`."""

    kind = interactions.Kind.RATIO

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(()))

    def pair(self, block: interactions.Block, query: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        """The logit."""
        factor = self.t.to(query.dtype).exp() / math.sqrt(query.shape[-1])
        return torch.einsum("mqhd,mphd->mqhp", query * factor, key)
