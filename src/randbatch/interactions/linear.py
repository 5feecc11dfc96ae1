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
        query_log, query_rest = _split(query.to(dtype))
        key_log, key_rest = _split(key.to(dtype))
        # what is taken out is no part of the result, and needs no gradient
        key_top, rest_top = (x.detach().amax(dim=1, keepdim=True) for x in (key_log, key_rest))  # [M, 1, H, D]
        key_map = (key_log - key_top).exp() * (key_rest / rest_top)
        query_log, query_shift = _shift(query_log)
        key_top, key_shift = _shift(key_top)
        query_log, shift = _shift(query_log + key_top)
        query_rest, query_factor = _divide(query_rest)
        rest_top, key_factor = _divide(rest_top)
        query_map = query_log.exp() * query_rest * rest_top
        summary = torch.einsum("mphd,mphe->mhde", key_map, value.to(dtype))
        norm = torch.einsum("mphd,mhd->mph", query_map, key_map.sum(dim=1))
        out = torch.einsum("mphd,mhde->mphe", query_map, summary) / norm.unsqueeze(-1)
        log_norm = norm.log() + shift + (query_shift + query_factor.log()) + (key_shift + key_factor.log())
        return out.to(value.dtype), log_norm


def _split(x: Float[Tensor, "*n d"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d"]]:
    """(a, b) of φ(x) = e^a b: (x, 1) for x <= 0, (0, 1 + x) above; the gradient at 0 is 1."""
    return x.clamp(max=0.0), F.relu(x) + 1


def _shift(logs: Float[Tensor, "*n d"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n"]]:
    """The logarithms less the largest of all dimensions, and that."""
    top = logs.detach().amax(dim=-1, keepdim=True)
    return logs - top, top.squeeze(-1)


def _divide(factors: Float[Tensor, "*n d"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n"]]:
    """The factors over the largest of all dimensions, and that."""
    top = factors.detach().amax(dim=-1, keepdim=True)
    return factors / top, top.squeeze(-1)


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
    (query_log, query_rest), (key_log, key_rest) = (_split(x.to(dtype)) for x in (query, key))
    logs, shift = _shift(query_log + key_log)
    query_rest, query_factor = _divide(query_rest)
    key_rest, key_factor = _divide(key_rest)
    return (logs.exp() * query_rest * key_rest).sum(dim=-1).log() + shift + query_factor.log() + key_factor.log()


def own_weight(query: Float[Tensor, "n h d"], key: Float[Tensor, "n h d"]) -> Float[Tensor, "n h"]:
    """`φ(q_i)ᵀ φ(k_i)`, the weight of a token on itself, in at least fp32."""
    return log_own_weight(query, key).exp()


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
