"""The weights of the corrected estimator, by least squares on the exact attention of a few sampled tokens.

The features of a token are all at hand: its in-batch attention A_δ (own logit lowered by δ log κ), the mean fields of
its batch and of its set. What they should add up to is known for S sampled tokens, the anchors, whose attention over
the whole set is computed exactly: S · N products, no gradient, no label. No random number is drawn.

Shape letters: N tokens, H heads, S anchors of each head, W widest batch, D head size of query and key, E of value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._shapes import Float, Int
from randbatch.estimators.mean_field import Moments, of_set
from randbatch.estimators.met import log_kappa, merge
from randbatch.partition import Partition

__all__ = ["Weights", "fit_weights"]

_ANCHORS = 64  # with 32 the weights of heavy-tailed heads may miss the best by a fifth
_CANDIDATES = 1024
_CANDIDATE_BATCHES = 32
_DEBIAS = (0.0, 0.25, 0.5, 0.75, 1.0)
_RIDGE = 1e-6  # only breaks ties


@dataclass(frozen=True, eq=False)
class Weights:
    """Of each head `[H]`: `ŷ = G + μ (A_δ − G) + ν (G − G_C) + λ (G − v̄)`, G the mean field of the set."""

    debias: Tensor
    mu: Tensor
    nu: Tensor
    lam: Tensor


@torch.no_grad()
def fit_weights(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h e"],
    rounds: Iterable[Partition],
    moments: Moments,
    scale: float,
) -> Weights:
    """Fit (δ, μ, ν, λ) of each head; the moments are those of the first round."""
    part = moments.part
    wide = moments.covariance.dtype
    set_of_token = None if part.set_of_batch is None else part.unpack(part.spread(part.set_of_batch))
    tokens, weight = _pick(query, moments, scale)
    own_set = torch.zeros_like(tokens) if set_of_token is None else set_of_token[tokens]
    heads = torch.arange(query.shape[1], device=query.device).unsqueeze(1)
    q, v = _rows(query, tokens).to(wide), _rows(value, tokens).to(wide)  # [H, S, D], [H, S, E]
    mean = moments.set_value_mean[own_set, heads]
    linear = scale * torch.einsum("hsd,hsde->hse", q, moments.set_covariance[own_set, heads])
    rest, odds, kappa, batch_field = _features(q, key, value, tokens, rounds, scale)
    exact = _attend_exactly(_rows(query, tokens), key, value, own_set, set_of_token, scale).to(wide)
    debias = torch.tensor(_DEBIAS, device=query.device, dtype=wide)[:, None, None, None]
    local = rest + torch.sigmoid(odds.unsqueeze(-1) - debias * kappa.unsqueeze(-1)) * (v - rest)  # [K, H, S, E]
    field = mean + linear
    columns = (local - field, (field - batch_field).expand_as(local), linear.expand_as(local))
    best, solution = _least_squares(columns, exact - local - (field - batch_field), weight, v - mean)
    return Weights(debias.flatten()[best], *solution.to(wide).unbind(1))


def _pick(query: Tensor, moments: Moments, scale: float) -> tuple[Int[Tensor, "h s"], Float[Tensor, "h s"]]:
    """A systematic sample, half uniform and half by the size of the mean fields, and its weights 1/√(C π).

    The candidates are the first slots of batches spread over all; tokens stand there at random. A set that is one batch
    has nothing to teach.
    """
    part, num_heads = moments.part, query.shape[1]
    starts, widths = part.starts_and_widths()
    split = (widths < of_set(part, moments.set_sizes)).nonzero().squeeze(1)
    rows = torch.arange(min(_CANDIDATE_BATCHES, len(split)), device=query.device)
    rows = split[rows * len(split) // len(rows)]
    slots = torch.arange(min(-(-_CANDIDATES // len(rows)), int(widths[rows].min())), device=query.device)
    position = starts[rows, None] + slots  # [B, r]
    candidates = part.order[position].flatten()
    covariance = of_set(part, moments.set_covariance).expand_as(moments.covariance)[rows]
    q = query[candidates].to(covariance.dtype).unflatten(0, position.shape)
    offset = of_set(part, moments.set_value_mean).expand_as(moments.value_mean)[rows] - moments.value_mean[rows]
    linear = scale * torch.einsum("brhd,bhde->hbre", q, covariance)
    control = offset.transpose(0, 1).unsqueeze(2) + scale * torch.einsum(
        "brhd,bhde->hbre", q, covariance - moments.covariance[rows]
    )
    tiny = torch.finfo(q.dtype).tiny
    sizes = (x.square().sum(dim=-1).flatten(1) for x in (linear, control))  # [H, C]
    score = torch.stack([size / size.mean(dim=1, keepdim=True).clamp(min=tiny) for size in sizes]).sum(dim=0).sqrt()
    chance = 1 / len(candidates) + score / score.sum(dim=1, keepdim=True).clamp(min=tiny)
    chance = chance.cumsum(dim=1)
    chance = chance / chance[:, -1:]
    num = min(_ANCHORS, len(candidates))
    steps = (torch.arange(num, device=query.device, dtype=q.dtype) + 0.5) / num
    picked = torch.searchsorted(chance, steps.expand(num_heads, -1).contiguous()).clamp(max=len(candidates) - 1)
    share = chance.diff(dim=1, prepend=chance.new_zeros(num_heads, 1)).gather(1, picked)
    return candidates[picked], (share * len(candidates)).clamp(min=tiny).rsqrt()


def _features(
    q: Tensor, key: Tensor, value: Tensor, tokens: Tensor, rounds: Iterable[Partition], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over all rounds: attention to the others, own logit minus theirs, log κ, and the mean field of the batches."""
    num_rounds = 0
    rest = lse = field = met = others = None
    for part in rounds:
        position = tokens if part.in_order else part.inverse[tokens]
        starts, widths = part.starts_and_widths()
        batch = part.spread(torch.arange(part.num_batches, device=tokens.device))[position]
        start, width = starts[batch].unsqueeze(-1), widths[batch].unsqueeze(-1)  # [H, S, 1]
        slots = torch.arange(part.num_slots, device=tokens.device)
        index = start + torch.minimum(slots, width - 1)
        filled = slots < width
        index = index if part.in_order else part.order[index]
        k, v = _rows(key, index).to(q.dtype), _rows(value, index).to(q.dtype)  # [H, S, W, D]
        logits = torch.einsum("hsd,hswd->hsw", q, k) * scale
        logits = logits.masked_fill(~filled | (index == tokens.unsqueeze(-1)), -torch.inf)
        more_lse = logits.logsumexp(dim=-1)
        weights = (logits - more_lse.clamp(min=torch.finfo(q.dtype).min).unsqueeze(-1)).exp()
        more = torch.einsum("hsw,hswe->hse", weights, v)
        share = (filled / width).unsqueeze(-1).to(q.dtype)
        key_mean, value_mean = ((share * x).sum(dim=2, keepdim=True) for x in (k, v))
        response = torch.einsum("hsd,hswd->hsw", q, k - key_mean) * share.squeeze(-1) * scale
        now = value_mean.squeeze(2) + torch.einsum("hsw,hswe->hse", response, v)
        met_now = width.squeeze(-1) - 1
        if rest is None or lse is None or field is None or met is None:
            rest, lse, field, met = more, more_lse, now, met_now
            others = part.unpack(part.count_others())[tokens]
        else:
            (rest, lse), field, met = merge(rest, lse, more, more_lse), field + now, met + met_now
        num_rounds += 1
    assert rest is not None and lse is not None and field is not None and met is not None and others is not None
    own = torch.einsum("hsd,hsd->hs", q, _rows(key, tokens).to(q.dtype)) * scale
    return rest, own - lse, log_kappa(others, met).to(q.dtype), field / num_rounds


def _rows(x: Float[Tensor, "n h d"], index: Int[Tensor, "h ..."]) -> Float[Tensor, "h ... d"]:
    """`x[index[h], h]` for every head; a third of the time of indexing by both."""
    return torch.stack(
        [x[:, head].index_select(0, rows.flatten()).unflatten(0, rows.shape) for head, rows in enumerate(index)]
    )


def _attend_exactly(
    query: Tensor, key: Tensor, value: Tensor, own_set: Tensor, set_of_token: Tensor | None, scale: float
) -> Float[Tensor, "h s e"]:
    """Attention of a few queries `[H, S, D]` to all keys of their sets."""
    same = None if set_of_token is None else (own_set.unsqueeze(-1) == set_of_token).unsqueeze(0)
    keys, values = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (key, value))
    return F.scaled_dot_product_attention(query.unsqueeze(0), keys, values, attn_mask=same, scale=scale).squeeze(0)


def _least_squares(
    columns: tuple[Tensor, ...], residual: Tensor, weight: Tensor, spread: Tensor
) -> tuple[Int[Tensor, " h"], Float[Tensor, "h 3"]]:
    """The index of the best δ, and its (μ, ν, λ): the correction of (1, 1, 0) that leaves least of `[K, H, S, E]`.

    Columns are scaled to one length, but one of rounding size (against the spread of the values) is none.
    """
    design = (torch.stack(columns, dim=-1) * weight[..., None, None]).flatten(2, 3).double()  # [K, H, S E, 3]
    target = (residual * weight.unsqueeze(-1)).flatten(2).unsqueeze(-1).double()
    least = 1e-4 * spread.double().square().sum(dim=(1, 2)).sqrt()[:, None, None]
    length = torch.maximum(design.square().sum(dim=2, keepdim=True).sqrt(), least)
    length = length.clamp(min=torch.finfo(torch.float64).tiny)
    design = design / length
    ridge = _RIDGE * torch.eye(design.shape[-1], dtype=design.dtype, device=design.device)
    solution = torch.linalg.solve_ex(design.mT @ design + ridge, design.mT @ target).result
    best = (target - design @ solution).square().sum(dim=(2, 3)).argmin(dim=0)
    solution = (solution / length.mT)[best, torch.arange(len(best), device=best.device), :, 0]
    return best, solution + solution.new_tensor([1.0, 1.0, 0.0])
