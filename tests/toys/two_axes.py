"""An interaction that is no sum over pairs with weights of their own: it is defined by `attend` alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from randbatch import interactions


@interactions.register("twice-normalised")
class TwiceNormalised(interactions.Interaction):
    """`y_i = Σ_j softmax_j(s_ij) softmax_i(s_ij) v_j` with `s_ij = q_i·k_j / √D`; several rounds are averaged."""

    kind = interactions.Kind.TWO_AXES

    def attend(self, block: interactions.Block, *projected: Tensor) -> Tensor:
        """All tokens of the batch, in at least fp32."""
        query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in projected)
        logits = torch.einsum("mqhd,mphd->mqhp", query, key) / math.sqrt(query.shape[-1])
        weights = logits.softmax(dim=3) * logits.softmax(dim=1)
        return torch.einsum("mqhp,mphe->mqhe", weights, value).to(projected[2].dtype)
