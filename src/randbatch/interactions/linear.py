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
    """`y_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)` with φ(x) = elu(x) + 1, and the log of the denominator.

    φ never vanishes, but e^x does in floating point, and 1 + (e^x − 1) long before: a common factor of all dimensions
    is taken out of every query, and one of all tokens out of every dimension of the keys.

    Source: Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236, equations 5 and 7.
    """
    _refuse_softmax_options(options)
    out, log_norm = over_blocks(part, _attend, query, key, value)
    return out, log_norm if options.need_log_norm else None


def _attend(
    _: int, query: Float[Tensor, "m p h d"], key: Float[Tensor, "m p h d"], value: Float[Tensor, "m p h dv"]
) -> tuple[Float[Tensor, "m p h dv"], Float[Tensor, "m p h"]]:
    """Output and log of the denominator of one rectangle of batches."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the sums over the batch
        query, key = query.to(dtype), key.to(dtype)
        query_map, query_shift, query_factor = _scale(query, dim=3)
        key_map, key_top, key_factor = _scale(key, dim=1)  # [M, 1, H, D] both
        key_shift, most = (x.amax(dim=3, keepdim=True) for x in (key_top, key_factor))
        logs = query_map + (key_top - key_shift)
        shift = logs.detach().amax(dim=3, keepdim=True)
        query_map = (logs - shift).exp() * _rest(query, query_factor)
        key_map = key_map.exp() * _rest(key, key_factor)
        key_factor = (key_factor / most).squeeze(1)
        summary = torch.einsum("mphd,mphe->mhde", key_map, value.to(dtype)) * key_factor.unsqueeze(-1)
        norm = torch.einsum("mphd,mhd->mph", query_map, key_map.sum(dim=1) * key_factor)
        out = torch.einsum("mphd,mhde->mphe", query_map, summary) / norm.unsqueeze(-1)
        taken_out = shift + (query_shift + query_factor.log()) + (key_shift + most.log())
        return out.to(value.dtype), norm.log() + taken_out.squeeze(3)


# φ(x) = e^min(x, 0) (1 + max(x, 0)); the slope at 0 is 1. What is taken out of either factor is no part of the result,
# and needs no gradient.


def _scale(x: Float[Tensor, "*n d"], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """`min(x, 0)` less the largest along `dim`, that, and the largest `1 + max(x, 0)`."""
    top = x.detach().amax(dim=dim, keepdim=True)
    largest = top.clamp(max=0.0)
    return x.clamp(max=0.0) - largest, largest, F.relu(top) + 1


def _rest(x: Float[Tensor, "*n d"], factor: Tensor) -> Float[Tensor, "*n d"]:
    """`(1 + max(x, 0)) / factor`."""
    share = 1 / factor
    return torch.addcmul(share, F.relu(x), share)


def count_once(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    out: Float[Tensor, "n h dv"],
    log_norm: Float[Tensor, "n h"],
    extra: int,
) -> Float[Tensor, "n h dv"]:
    """Attention and log of its denominator in which each token is `extra` times too often its own key, put right."""
    share = extra * (log_own_weight(query, key) - log_norm).exp().unsqueeze(-1)  # of the whole
    return ((out - share * value) / (1 - share)).to(value.dtype)


def log_own_weight(query: Float[Tensor, "n h d"], key: Float[Tensor, "n h d"]) -> Float[Tensor, "n h"]:
    """`log φ(q_i)ᵀ φ(k_i)`, of the weight of a token on itself, in at least fp32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    (query_log, query_shift, query_factor), (key_log, key_shift, key_factor) = (
        _scale(x.to(dtype), dim=2) for x in (query, key)
    )
    logs = query_log + key_log
    shift = logs.detach().amax(dim=2, keepdim=True)
    weights = (logs - shift).exp() * _rest(query.to(dtype), query_factor) * _rest(key.to(dtype), key_factor)
    taken_out = shift + (query_shift + query_factor.log()) + (key_shift + key_factor.log())
    return weights.sum(dim=2).log() + taken_out.squeeze(2)


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
