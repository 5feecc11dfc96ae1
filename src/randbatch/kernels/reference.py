"""The formula in plain torch: any dtype, any device, every option. It keeps the M · H · P² logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._shapes import Float
from randbatch.kernels.problem import Problem


def why_not(problem: Problem) -> str | None:
    """The reference takes everything."""
    return None


def attend(
    query: Float[Tensor, "m q h d"], key: Float[Tensor, "m p h d"], value: Float[Tensor, "m p h dv"], problem: Problem
) -> tuple[Float[Tensor, "m q h dv"], Float[Tensor, "m q h"] | None]:
    """`softmax_j(scale · q_i·k_j) v_j` inside each batch, accumulated in at least fp32."""
    dtype = torch.promote_types(problem.dtype, torch.float32)
    with torch.autocast(problem.device.type, enabled=False):  # autocast would round the products again
        logits = torch.einsum("mqhd,mphd->mqhp", query.to(dtype) * problem.scale, key.to(dtype))
        weights = F.dropout(torch.softmax(logits, dim=-1), problem.dropout_p)
        out = torch.einsum("mqhp,mphe->mqhe", weights, value.to(dtype))
        return out.to(problem.dtype), torch.logsumexp(logits, dim=-1) if problem.need_lse else None
