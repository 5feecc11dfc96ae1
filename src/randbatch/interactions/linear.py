"""Linear attention inside each batch: O(P · D²) work per batch, no P² term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._shapes import Float
from randbatch.interactions.options import Options
from randbatch.kernels import over_blocks
from randbatch.partition import Partition


def linear_attention(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    part: Partition,
    options: Options,
) -> tuple[Float[Tensor, "n h dv"], Float[Tensor, "n h"] | None]:
    """`y_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)` with φ(x) = elu(x) + 1.

    Source: Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236, equations 5 and 7.
    """
    _refuse_softmax_options(options)
    out, norm = over_blocks(part, _attend, query, key, value)
    return out, norm.log() if options.need_log_norm else None


def _attend(
    _: int, query: Float[Tensor, "m p h d"], key: Float[Tensor, "m p h d"], value: Float[Tensor, "m p h dv"]
) -> tuple[Float[Tensor, "m p h dv"], Float[Tensor, "m p h"]]:
    """Output and denominator of one rectangle of batches."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the sums over the batch
        query_map, key_map = F.elu(query.to(dtype)) + 1, F.elu(key.to(dtype)) + 1
        summary = torch.einsum("mphd,mphe->mhde", key_map, value.to(dtype))
        norm = torch.einsum("mphd,mhd->mph", query_map, key_map.sum(dim=1))
        out = torch.einsum("mphd,mhde->mphe", query_map, summary) / norm.unsqueeze(-1)
        return out.to(value.dtype), norm


def own_weight(query: Float[Tensor, "n h d"], key: Float[Tensor, "n h d"]) -> Float[Tensor, "n h"]:
    """`φ(q_i)ᵀ φ(k_i)`, the weight of a token on itself, in at least fp32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return ((F.elu(query.to(dtype)) + 1) * (F.elu(key.to(dtype)) + 1)).sum(dim=-1)


def _refuse_softmax_options(options: Options) -> None:
    if options.scale is not None:
        raise ValueError(f"scale must be None with interaction 'linear', which has no logits; got {options.scale}")
    if options.dropout_p:
        raise ValueError(
            f"dropout_p must be 0 with interaction 'linear', which has no attention weights; got {options.dropout_p}"
        )
    if options.backend != "auto":
        raise ValueError(
            f"backend must be 'auto' with interaction 'linear', which has one implementation; got {options.backend!r}"
        )
