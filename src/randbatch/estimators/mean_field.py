"""The attention of a Gaussian cloud with the moments of a set: of a random batch, and of the whole.

`G_S(q) = v̄_S + scale · Cov_S(v, k) q`, exact for keys and values that are jointly Gaussian. Moments are taken batch by
batch; those of a set follow from those of its batches.

Shape letters: N tokens, M batches, G sets, H heads, D head size of query and key, E of value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randbatch._autograd import refuse_second_derivative
from randbatch._shapes import Bool, Float, Shaped
from randbatch.partition import Partition

__all__ = ["Moments", "add_mean_field", "of_set", "sets_that_meet", "value_range", "weigh"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and covariances of keys and values, of each batch and of the set that it is of.

    Attributes:
        part: the partition.
        set_sizes: `[G]`.
        share: `[M, 1, 1]`, the share of the batch in its set.
        keys: centred keys, one `[rows, width, H, D]` per batch size.
        values: values, one `[rows, width, H, E]` per batch size.
        key_offset: `[M, H, D]`, mean key of the batch minus that of its set.
        value_mean: `[M, H, E]`.
        value_offset: `[M, H, E]`, mean value of the batch minus that of its set.
        covariance: `[M, H, D, E]`.
        set_value_mean: `[G, H, E]`.
        set_covariance: `[G, H, D, E]`.
    """

    part: Partition
    set_sizes: Tensor
    share: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    key_offset: Tensor
    value_mean: Tensor
    value_offset: Tensor
    covariance: Tensor
    set_value_mean: Tensor
    set_covariance: Tensor

    @classmethod
    def of(cls, part: Partition, key: Float[Tensor, "n h d"], value: Float[Tensor, "n h e"]) -> Moments:
        """The moments of keys and values that stand in the partition's token order; in at least fp32, no gradient."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        key_means: list[Tensor] = []
        value_means: list[Tensor] = []
        covariances: list[Tensor] = []
        with torch.no_grad():
            for k, v in zip(part.split(part.pack(key)), part.split(part.pack(value)), strict=True):
                wide = torch.promote_types(k.dtype, torch.float32)
                mean = k.mean(dim=1, dtype=wide)
                keys.append(k - mean.unsqueeze(1))
                values.append(v.to(wide))
                key_means.append(mean)
                value_means.append(v.mean(dim=1, dtype=wide))
                covariances.append(_sum_outer(keys[-1], values[-1]).div_(k.shape[1]))
            key_mean, value_mean, covariance = (torch.cat(x) for x in (key_means, value_means, covariances))
            set_sizes = (
                torch.full((1,), part.num_tokens, device=key.device) if part.set_sizes is None else part.set_sizes
            )
            share = part.starts_and_widths()[1].to(key_mean.dtype) / of_set(part, set_sizes)
            share = share[:, None, None]
            set_key_mean, set_value_mean = (sum_over_sets(part, share * mean) for mean in (key_mean, value_mean))
            key_offset = key_mean - of_set(part, set_key_mean)
            value_offset = value_mean - of_set(part, set_value_mean)
            between = torch.einsum("mhd,mhe->mhde", share * key_offset, value_offset)
            set_covariance = sum_over_sets(part, share.unsqueeze(-1) * covariance + between)
        return cls(
            part,
            set_sizes,
            share,
            keys,
            values,
            key_offset,
            value_mean,
            value_offset,
            covariance,
            set_value_mean,
            set_covariance,
        )


# Products go head by head on views of `[M, P, H, D]`: up to a quarter faster than all at once on transposed copies.


def _sum_outer(left: Float[Tensor, "m p h d"], right: Float[Tensor, "m p h e"]) -> Float[Tensor, "m h d e"]:
    """`Σ_p left rightᵀ` of each batch and head."""
    return torch.stack([left[:, :, head].mT @ right[:, :, head] for head in range(left.shape[2])], dim=1)


def _multiply(
    blocks: Float[Tensor, "m p h d"], matrices: Float[Tensor, "m h d e"], shifts: Float[Tensor, "m h e"]
) -> Float[Tensor, "m p h e"]:
    """`x W + b` with a matrix and a shift for each batch and head."""
    out = blocks.new_empty(*blocks.shape[:3], matrices.shape[3])
    for head in range(blocks.shape[2]):
        out[:, :, head] = torch.baddbmm(shifts[:, head].unsqueeze(1), blocks[:, :, head], matrices[:, head])
    return out


def sum_over_sets(part: Partition, x: Shaped[Tensor, "m ..."]) -> Shaped[Tensor, "g ..."]:
    """The sums over the batches of each set."""
    if part.set_of_batch is None or part.set_sizes is None:
        return x.sum(dim=0, keepdim=True)
    return x.new_zeros(part.set_sizes.numel(), *x.shape[1:]).index_add_(0, part.set_of_batch, x)


def of_set(part: Partition, x: Shaped[Tensor, "g ..."]) -> Shaped[Tensor, "m_or_1 ..."]:
    """What belongs to a set, to each of its batches; `[1, …]`, to be broadcast, where there is one set."""
    return x if part.set_of_batch is None else x.index_select(0, part.set_of_batch)


def value_range(
    part: Partition, value: Float[Tensor, "n h e"]
) -> tuple[Float[Tensor, "g h e"], Float[Tensor, "g h e"]]:
    """The smallest and the largest number of each set, head and dimension; NaN is none."""
    low, high = (torch.where(value.isnan(), limit, value) for limit in (torch.inf, -torch.inf))
    if part.set_of_batch is None or part.set_sizes is None:
        return low.amin(dim=0, keepdim=True), high.amax(dim=0, keepdim=True)
    index = part.unpack(part.spread(part.set_of_batch))[:, None, None].expand_as(value)
    shape = part.set_sizes.numel(), *value.shape[1:]
    return (
        low.new_full(shape, torch.inf).scatter_reduce(0, index, low, "amin"),
        high.new_full(shape, -torch.inf).scatter_reduce(0, index, high, "amax"),
    )


def sets_that_meet(part: Partition) -> Bool[Tensor, " g"]:
    """In which sets any tokens meet: a set that had its rounds waits, each token alone, until others had theirs."""
    widths = part.starts_and_widths()[1]
    if part.set_of_batch is None or part.set_sizes is None:
        return (widths > 1).any().unsqueeze(0)
    widest = torch.zeros_like(part.set_sizes).scatter_reduce_(0, part.set_of_batch, widths, "amax")
    return widest > 1


def add_mean_field(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h e"],
    local: Float[Tensor, "n h e"],
    moments: Moments,
    scale: float,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Shaped[Tensor, "n ..."]:
    """`ω A + (α v̄ − ν v̄_C) + scale · (β Cov − ν Cov_C) q` for local attention A, by weights of each set, `[G, H]`.

    One product per batch. The gradient knows that the moments are those of `key` and `value`; the weights (ω, α, β, ν)
    have none. A field that has no weight may be infinite.
    """
    out: Any = _AddMeanField.apply(query, key, value, local, moments, scale, weights)
    return out


def weigh(weight: Tensor, field: Tensor) -> Tensor:
    """Their product, and 0 where the weight is 0, whatever the field."""
    return torch.where(weight == 0, 0.0, weight * field)


class _AddMeanField(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        local: Tensor,
        moments: Moments,
        scale: float,
        weights: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> Tensor:
        part = moments.part
        of_batch = (of_set(part, weight.to(moments.covariance.dtype)).unsqueeze(2) for weight in weights)
        of_local, alpha, beta, nu = of_batch  # [M or 1, H, 1]
        shift = weigh(alpha, of_set(part, moments.set_value_mean)) - weigh(nu, moments.value_mean)
        slope = weigh(beta.unsqueeze(3), of_set(part, moments.set_covariance))
        slope = (slope - weigh(nu.unsqueeze(3), moments.covariance)) * scale
        queries = [block.to(slope.dtype) for block in part.split(part.pack(query))]
        rows = [block.shape[0] for block in queries]
        pieces = zip(queries, slope.split(rows), shift.split(rows), strict=True)
        linear = part.unpack(part.join([_multiply(*piece) for piece in pieces]))
        of_local = of_local if part.set_of_batch is None else part.unpack(part.spread(of_local))
        out = torch.addcmul(linear, local, of_local).to(local.dtype)
        is_used = (alpha != 0) | (beta != 0) | (nu != 0)
        means = (weigh(is_used, x) for x in (moments.key_offset, moments.value_mean, moments.value_offset))
        # saved as tensors, not as an attribute, so that checkpointing sees them
        ctx.save_for_backward(
            slope, of_local, alpha, beta, nu, moments.share, *means, *queries, *moments.keys, *moments.values
        )
        ctx.part, ctx.scale = part, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative(
            "estimator 'corrected'", "take 'plain' or 'debiased', whose weights are not fitted to the input"
        )
        slope, of_local, alpha, beta, nu, share, key_offset, value_mean, value_offset, *rest = ctx.saved_tensors
        (grad,) = grads
        part = ctx.part
        num = len(part.groups)
        queries, keys, values = rest[:num], rest[num : 2 * num], rest[2 * num :]
        blocks = [block.to(slope.dtype) for block in part.split(part.pack(grad))]
        to_slope = torch.cat([_sum_outer(q, g) for q, g in zip(queries, blocks, strict=True)]) * ctx.scale
        to_shift = torch.cat([g.sum(dim=1) for g in blocks])
        to_set_covariance = of_set(part, sum_over_sets(part, beta.unsqueeze(3) * to_slope))
        to_set_mean = of_set(part, sum_over_sets(part, alpha * to_shift))
        to_covariance = share.unsqueeze(-1) * to_set_covariance - nu.unsqueeze(3) * to_slope
        to_value_mean = share * to_set_mean - nu * to_shift
        to_value_mean = to_value_mean + share * torch.einsum("mhd,mhde->mhe", key_offset, to_set_covariance)
        to_key_mean = share * torch.einsum("mhe,mhde->mhd", value_offset, to_set_covariance)
        rows = [block.shape[0] for block in blocks]
        per_batch = (to_covariance, value_mean, to_key_mean, to_value_mean, slope)
        pieces = zip(*(x.split(rows) for x in per_batch), keys, values, blocks, strict=True)
        results: list[tuple[Tensor, Tensor, Tensor]] = []
        for cov, own_mean, key_mean, mean, w, k, v, g in pieces:
            cov, key_mean, mean = (x / k.shape[1] for x in (cov, key_mean, mean))
            of_key = key_mean - torch.einsum("mhe,mhde->mhd", own_mean, cov)
            to_query = _multiply(g, w.mT, torch.zeros_like(key_mean))
            results.append((to_query, _multiply(v, cov.mT, of_key), _multiply(k, cov, mean)))
        moved = [part.unpack(part.join(list(column))).to(grad.dtype) for column in zip(*results, strict=True)]
        return *moved, (of_local * grad).to(grad.dtype), None, None, None
