"""Linear attention inside each batch: O(P · D²) work per batch, no P² term."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randbatch._errors import InvalidType
from randbatch._numerics import wide_dtype
from randbatch._shapes import Float
from randbatch.interactions.base import Block, Interaction, Kind, not_self
from randbatch.interactions.merge import Partial

__all__ = ["Linear"]

_SMALL = 32  # tokens of a batch whose pairs cost no more than the sums do

FeatureMap = Callable[[Tensor], Tensor]


class Linear(Interaction):
    """`y_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)` with φ(x) = elu(x) + 1.

    φ never vanishes, but e^x does in floating point, and 1 + (e^x − 1) long before: a common factor of all dimensions
    is taken out of every query, and one of all tokens out of every dimension of the keys.

    Args:
        feature_map: another φ, `[…, D] -> […, F]` with positive elements, without parameters. It is computed in at
            least fp32, and nothing is taken out of it. Default: elu + 1.

    Raises:
        TypeError: `feature_map` cannot be called, or has parameters, which no layer would find here.

    Source: Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236, equations 5 and 7.

    Example:
        >>> squared_relu = Linear(feature_map=lambda x: torch.relu(x).square() + 1e-3)
        >>> squared_relu.kind.value
        'ratio'
    """

    name = "linear"
    kind = Kind.RATIO

    def __init__(self, feature_map: FeatureMap | None = None) -> None:
        if feature_map is not None and not callable(feature_map):
            raise InvalidType(f"feature_map must be a function of a tensor, got {type(feature_map).__name__}")
        if isinstance(feature_map, nn.Module):
            raise InvalidType(
                "feature_map must have no parameters, got an nn.Module; write an interaction that is a module itself"
            )
        self.feature_map = feature_map

    def attend(self, block: Block, *projected: Float[Tensor, "m p h _"]) -> Float[Tensor, "m p h e"]:
        """All tokens of the batch, through their sums."""
        return self._attend(*projected)[0].to(projected[2].dtype)

    def partial(self, block: Block, *projected: Float[Tensor, "m p h _"]) -> Partial:
        """The other tokens: from the weights of all pairs in small batches, else the sums less what a token added.

        Small batches come in many rounds, in which a difference would lose a digit for every ten. Where hardly anything
        is left of a difference, the rest is taken for as much as rounding leaves unknown.
        """
        query, key, value = projected
        if query.shape[1] <= max(_SMALL, query.shape[3]):
            return self._pairs(query, key, value)
        out, log_norm = self._attend(query, key, value)
        share = (self._log_own_weight(query, key) - log_norm).exp()
        rest = (1 - share).clamp(min=torch.finfo(share.dtype).eps)
        return Partial((out - share.unsqueeze(-1) * value) / rest.unsqueeze(-1), log_norm + rest.log())

    def own(self, block: Block, *projected: Float[Tensor, "n h _"]) -> Partial:
        """A token's value, and the logarithm of its weight on itself."""
        query, key, value = projected
        return Partial(value, self._log_own_weight(query, key))

    def _pairs(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """The other tokens of small batches."""
        dtype, tiny = wide_dtype(query), torch.finfo(wide_dtype(query)).tiny
        with torch.autocast(query.device.type, enabled=False):
            if self.feature_map is None:
                query_map, key_map, taken_out = _maps(query.to(dtype), key.to(dtype))
            else:
                query_map, key_map, taken_out = self._map(query), self._map(key), query.new_zeros((), dtype=dtype)
            others = not_self(query.shape[1], query.device)
            weights = torch.einsum("mqhd,mphd->mqhp", query_map, key_map) * others
            total = weights.sum(dim=-1)
            some = total > 0
            norm = total.clamp(min=tiny)
            out = torch.einsum("mqhp,mphe->mqhe", weights, value.to(dtype)) / norm.unsqueeze(-1)
            return Partial(out, torch.where(some, norm.log() + taken_out, -torch.inf))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.feature_map is None:
            return _attend(query, key, value)
        query, key, value = self._map(query), self._map(key), value.to(wide_dtype(value))
        with torch.autocast(query.device.type, enabled=False):
            norm = torch.einsum("mphd,mhd->mph", query, key.sum(dim=1))
            summary = torch.einsum("mphd,mphe->mhde", key, value)
            return torch.einsum("mphd,mhde->mphe", query, summary) / norm.unsqueeze(-1), norm.log()

    def _log_own_weight(self, query: Tensor, key: Tensor) -> Tensor:
        if self.feature_map is None:
            return _log_own_weight(query, key)
        return (self._map(query) * self._map(key)).sum(dim=-1).log()

    def _map(self, x: Tensor) -> Tensor:
        assert self.feature_map is not None
        with torch.autocast(x.device.type, enabled=False):
            return self.feature_map(x.to(wide_dtype(x)))


def _attend(
    query: Float[Tensor, "m p h d"], key: Float[Tensor, "m p h d"], value: Float[Tensor, "m p h dv"]
) -> tuple[Float[Tensor, "m p h dv"], Float[Tensor, "m p h"]]:
    """Output and log of the denominator of batches of one size."""
    dtype = wide_dtype(query)
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the sums over the batch
        query_map, query_out = _query_map(query.to(dtype), key.to(dtype))
        key_map, key_factor, key_out = _key_map(key.to(dtype))
        summary = torch.einsum("mphd,mphe->mhde", key_map, value.to(dtype)) * key_factor.unsqueeze(-1)
        norm = torch.einsum("mphd,mhd->mph", query_map, key_map.sum(dim=1) * key_factor)
        out = torch.einsum("mphd,mhde->mphe", query_map, summary) / norm.unsqueeze(-1)
        return out, norm.log() + (query_out + key_out).squeeze(3)


def _maps(
    query: Float[Tensor, "m p h d"], key: Float[Tensor, "m p h d"]
) -> tuple[Float[Tensor, "m p h d"], Float[Tensor, "m p h d"], Float[Tensor, "m p h"]]:
    """φ of queries and keys but for factors, and the logarithm of the factor of every query's sums."""
    query_map, query_out = _query_map(query, key)
    key_map, key_factor, key_out = _key_map(key)
    return query_map, key_map * key_factor.unsqueeze(1), (query_out + key_out).squeeze(3)


def _query_map(query: Float[Tensor, "m p h d"], key: Float[Tensor, "m p h d"]) -> tuple[Tensor, Tensor]:
    """With the largest of every dimension of the keys in it, and less its own largest."""
    query_map, query_shift, query_factor = _scale(query, dim=3)
    _, key_top, _ = _scale(key, dim=1)
    logs = query_map + (key_top - key_top.amax(dim=3, keepdim=True))
    shift = logs.detach().amax(dim=3, keepdim=True)
    return (logs - shift).exp() * _rest(query, query_factor), shift + (query_shift + query_factor.log())


def _key_map(key: Float[Tensor, "m p h d"]) -> tuple[Tensor, Float[Tensor, "m h d"], Tensor]:
    """Less the largest of every dimension; the factors of the dimensions that are left; what is taken out of all."""
    key_map, key_top, key_factor = _scale(key, dim=1)  # [M, 1, H, D] both
    key_shift, most = (x.amax(dim=3, keepdim=True) for x in (key_top, key_factor))
    return key_map.exp() * _rest(key, key_factor), (key_factor / most).squeeze(1), key_shift + most.log()


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


def _log_own_weight(query: Float[Tensor, "*n h d"], key: Float[Tensor, "*n h d"]) -> Float[Tensor, "*n h"]:
    """`log φ(q_i)ᵀ φ(k_i)`, of the weight of a token on itself, in at least fp32."""
    dtype = wide_dtype(query)
    (query_log, query_shift, query_factor), (key_log, key_shift, key_factor) = (
        _scale(x.to(dtype), dim=-1) for x in (query, key)
    )
    logs = query_log + key_log
    shift = logs.detach().amax(dim=-1, keepdim=True)
    weights = (logs - shift).exp() * _rest(query.to(dtype), query_factor) * _rest(key.to(dtype), key_factor)
    taken_out = shift + (query_shift + query_factor.log()) + (key_shift + key_factor.log())
    return weights.sum(dim=-1).log() + taken_out.squeeze(-1)
