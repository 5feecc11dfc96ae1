"""The weights of the corrected estimator, by least squares on the exact attention of a few sampled tokens.

The features of a token are all at hand: its in-batch attention A_δ (own logit lowered by δ log κ), the mean fields of
its batch and of its set. What they should add up to is known for S sampled tokens, the anchors, whose attention over
the whole set is computed exactly: S · N products, no gradient, no label. No random number is drawn.

Shape letters: N tokens, H heads, S anchors of each head, D head size of query and key, E of value, K values of δ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch._shapes import Float, Int
from randbatch.estimators.at_tokens import AtTokens, SetsOf, attend_exactly, rows_of
from randbatch.estimators.mean_field import Moments, of_set
from randbatch.partition import Partition

__all__ = ["Anchors", "Weights", "fit_weights", "set_field"]

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

    def correct(
        self,
        local: Float[Tensor, "h s e"],
        field: Float[Tensor, "h s e"],
        batch_field: Float[Tensor, "h s e"],
        mean: Float[Tensor, "h s e"],
    ) -> Float[Tensor, "h s e"]:
        """ŷ from A_δ, G, G_C and v̄."""
        mu, nu, lam = (weight[:, None, None] for weight in (self.mu, self.nu, self.lam))
        return field + mu * (local - field) + nu * (field - batch_field) + lam * (field - mean)


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
    anchors = Anchors(query, key, value, moments, scale)
    for part in rounds:
        anchors.at.add(part)
    return anchors.fit()


class Anchors:
    """Sampled tokens `[H, S]` with their exact attention; rounds are added to `at`."""

    def __init__(
        self,
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h e"],
        moments: Moments,
        scale: float,
    ) -> None:
        tokens, self._weight = _pick(query, moments, scale)
        self.at = AtTokens(query, key, value, tokens, scale)
        sets = SetsOf(moments.part, tokens)
        self._mean, self._linear = set_field(self.at.query, moments, sets.own, scale)
        self._exact = attend_exactly(rows_of(query, tokens), key, value, sets, scale).to(self._mean.dtype)

    def fit(self) -> Weights:
        """The weights for the rounds that were added so far."""
        at, mean, linear = self.at, self._mean, self._linear
        debias = torch.tensor(_DEBIAS, device=mean.device, dtype=mean.dtype)
        local, field = at.local(debias[:, None, None, None]), mean + linear  # [K, H, S, E], [H, S, E]
        columns = (local - field, (field - at.field).expand_as(local), linear.expand_as(local))
        target = self._exact - local - (field - at.field)
        best, solution = _least_squares(columns, target, self._weight, at.value - mean)
        return Weights(debias[best], *solution.to(mean.dtype).unbind(1))


def set_field(
    query: Float[Tensor, "h s d"], moments: Moments, own_set: Int[Tensor, "h s"], scale: float
) -> tuple[Float[Tensor, "h s e"], Float[Tensor, "h s e"]]:
    """Of a few tokens, the two parts of `G = v̄ + scale · Cov(v, k) q` of their sets."""
    heads = torch.arange(len(query), device=query.device).unsqueeze(1)
    mean = moments.set_value_mean[own_set, heads]
    return mean, scale * torch.einsum("hsd,hsde->hse", query, moments.set_covariance[own_set, heads])


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
