"""The weights of the corrected estimator, by least squares on the exact attention of a few sampled tokens.

The features of a token are all at hand: its in-batch attention A_δ (own logit lowered by δ log κ), the mean fields of
its batch and of its set. What they should add up to is known for some sampled tokens of each set, the anchors, whose
attention over the set is computed exactly: at most 64 N products, no gradient, no label. No random number is drawn.
Every set is fitted by itself: what a graph gets depends on no other.

Shape letters: N tokens, G sets, H heads, S anchors of all sets, C candidates, D head size of query and key, E of value,
K values of δ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch._seeds import hash_positions
from randbatch._shapes import Float, Int, Shaped
from randbatch.estimators.mean_field import Moments, of_set, weigh
from randbatch.estimators.probe import AtTokens, SetsOf, attend_in_sets, pad_runs
from randbatch.partition import Partition

__all__ = ["Anchors", "Weights", "fit_weights", "set_field"]

_ANCHORS = 64  # of a set; with 32 the weights of heavy-tailed heads may miss the best by a fifth
_FEWEST = 16  # of a set that is small: an eighth of its tokens, but so many
_SHARE = 8
_CANDIDATES = 256
_CANDIDATE_BATCHES = 32
_DEBIAS = (1.0, 0.0)  # what lies between was never better; the first is what is fallen back on
_ROUNDING = 8  # units in the last place, below which there is nothing to correct
_RIDGE = 1e-6  # only breaks ties
_ORDER = 0x616E63  # any number: the order in which candidates are taken


@dataclass(frozen=True, eq=False)
class Weights:
    """Of each set and head `[G, H]`: `ŷ = v̄ + μ (A_δ − v̄) + β (G − v̄) + ν (G − G_C)`, G the mean field of the set.

    δ = μ = 1 and β = ν = 0 is the debiased estimator.
    """

    debias: Tensor
    mu: Tensor
    beta: Tensor
    nu: Tensor

    def at(self, sets: SetsOf) -> Weights:
        """Those of chosen tokens, `[H, S, 1]`."""
        heads = torch.arange(len(sets.own), device=sets.own.device).unsqueeze(1)
        return Weights(*(x[sets.own, heads].unsqueeze(-1) for x in (self.debias, self.mu, self.beta, self.nu)))

    def correct(
        self,
        local: Float[Tensor, "h s e"],
        linear: Float[Tensor, "h s e"],
        batch_field: Float[Tensor, "h s e"],
        mean: Float[Tensor, "h s e"],
    ) -> Float[Tensor, "h s e"]:
        """ŷ from A_δ, G − v̄, G_C and v̄, by weights `[H, S, 1]`; a field that has no weight may be infinite."""
        out = self.mu * local + weigh(1 - self.mu, mean) + weigh(self.beta, linear)
        return out + weigh(self.nu, mean + linear - batch_field)


@torch.no_grad()
def fit_weights(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h e"],
    rounds: Iterable[Partition],
    moments: Moments,
    scale: float,
) -> Weights:
    """Fit (δ, μ, β, ν) of each set and head; the moments are those of the first round."""
    anchors = Anchors(query, key, value, moments, scale)
    for part in rounds:
        anchors.at.add(part)
    return anchors.fit()


class Anchors:
    """Sampled tokens `[H, S]`, set after set, with their exact attention; rounds are added to `at`."""

    def __init__(
        self,
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h e"],
        moments: Moments,
        scale: float,
    ) -> None:
        self._picked = picked = _pick(query, moments, scale)
        self._num_sets = moments.set_sizes.numel()
        self.at = AtTokens(query, key, value, picked.tokens, scale)
        self._mean, self._linear = _set_field_in_rows(self.at.query, moments, picked, scale)
        exact = attend_in_sets(query, key, value, picked.tokens, picked.own_set, moments.part, scale)
        self._exact = exact.double()

    def fit(self) -> Weights:
        """The weights for the rounds that were added so far."""
        at, mean, linear = self.at, self._mean.double(), self._linear.double()
        debias = at.query.new_tensor(_DEBIAS)
        local = at.local(debias[:, None, None, None]).double()  # [K, H, S, E]
        design = local.new_empty(*local.shape, 4)  # [K, H, S, E, 4], the target last
        columns = local - mean, linear, mean + linear - at.field, self._exact - local
        for number, column in enumerate(columns):
            design[..., number] = column
        usable = design.isfinite().all(dim=-1).all(dim=-1).all(dim=0)  # a NaN stays with its token
        weight = torch.where(usable, self._picked.chance.rsqrt(), 0.0)
        design = design.masked_fill_(~usable[..., None, None], 0.0).mul_(weight[..., None, None])
        sizes = torch.stack([at.value - mean, self._exact]).square().sum(dim=-1)
        sizes = sizes.masked_fill_(~usable, 0.0).mul_(weight.square())  # [2, H, S]
        spread, whole = self._sum_halves(sizes.permute(2, 0, 1)).sum(dim=0).unbind(1)  # [G, H] each
        rounding = (_ROUNDING * torch.finfo(at.query.dtype).eps) ** 2 * whole
        grams = self._sum_halves((design.mT @ design).permute(2, 0, 1, 3, 4))  # [2, G, K, H, 4, 4]
        return Weights(*(x.to(at.query.dtype) for x in _best(grams, 1e-4 * spread.sqrt(), rounding, debias)))

    def _sum_halves(self, x: Shaped[Tensor, "s ..."]) -> Shaped[Tensor, "two g ..."]:
        """The sums over every other anchor of each set, and over the rest."""
        place = self._picked.rank % 2 * self._num_sets + self._picked.own_set
        sums = x.new_zeros(2 * self._num_sets, *x.shape[1:]).index_add_(0, place, x)
        return sums.unflatten(0, (2, self._num_sets))


def set_field(
    query: Float[Tensor, "h s d"], moments: Moments, own_set: Int[Tensor, "h s"], scale: float
) -> tuple[Float[Tensor, "h s e"], Float[Tensor, "h s e"]]:
    """Of a few tokens, the two parts of `G = v̄ + scale · Cov(v, k) q` of their sets."""
    heads = torch.arange(len(query), device=query.device).unsqueeze(1)
    mean = moments.set_value_mean[own_set, heads]
    return mean, scale * torch.einsum("hsd,hsde->hse", query, moments.set_covariance[own_set, heads])


@dataclass(frozen=True, eq=False)
class _Picked:
    """The anchors, set after set.

    Attributes:
        tokens: `[H, S]`.
        own_set: `[S]`.
        rank: `[S]`, the place among the anchors of the set.
        chance: `[H, S]`, the probability with which each was taken.
    """

    tokens: Tensor
    own_set: Tensor
    rank: Tensor
    chance: Tensor


def _set_field_in_rows(
    query: Float[Tensor, "h s d"], moments: Moments, picked: _Picked, scale: float
) -> tuple[Float[Tensor, "h s e"], Float[Tensor, "h s e"]]:
    """`set_field` of the anchors, one product for each set: its covariance is not copied for each of them."""
    index, filled, sets = pad_runs(picked.own_set)
    linear = query[:, index] @ moments.set_covariance[sets].transpose(0, 1)  # [H, rows, most, E]
    mean = moments.set_value_mean[picked.own_set].transpose(0, 1)
    return mean, scale * linear[:, filled]


def _pick(query: Tensor, moments: Moments, scale: float) -> _Picked:
    """A sample of each set, half uniform and half by the size of the mean fields.

    The candidates are the first slots of batches spread over the set; tokens stand there at random. A set that is one
    batch has nothing to teach. A candidate is taken by the rule of Pareto sampling, with the hash of its place in the
    set for a random number.

    Source: Rosén, "On sampling with probability proportional to size", J. Stat. Plan. Inference 62 (1997).
    """
    tokens, own_set, sizes = _candidates(query, moments, scale)
    number = torch.bincount(own_set, minlength=moments.set_sizes.numel())  # of candidates [G]
    first = number.cumsum(0) - number
    rank = torch.arange(len(own_set), device=own_set.device) - first[own_set]
    wanted = torch.minimum((moments.set_sizes // _SHARE).clamp(_FEWEST, _ANCHORS), number)

    def total(x: Tensor) -> Tensor:  # over the candidate's set, [H, C]
        return x.new_zeros(len(x), len(number)).index_add_(1, own_set, x)[:, own_set]

    tiny = torch.finfo(torch.float64).tiny
    score = sum((size / total(size).clamp(min=tiny) for size in sizes), torch.zeros_like(sizes[0])).sqrt()
    chance = 1 / number[own_set] + score / total(score).clamp(min=tiny)
    chance = (chance * wanted[own_set] / total(chance)).clamp(max=1.0)
    odds = (hash_positions(rank, _ORDER) >> 10).double().add_(0.5).mul_(2.0**-53)
    odds = odds / (1 - odds) * ((1 - chance) / chance)
    by_odds = odds.argsort(dim=1, stable=True)
    order = by_odds.gather(1, own_set[by_odds].argsort(dim=1, stable=True))  # set after set, by odds
    kept = rank < wanted[own_set]
    order = order[:, kept]
    return _Picked(tokens[order], own_set[kept], rank[kept], chance.gather(1, order))


def _candidates(
    query: Tensor, moments: Moments, scale: float
) -> tuple[Int[Tensor, " c"], Int[Tensor, " c"], list[Float[Tensor, "h c"]]]:
    """Tokens, their sets, and the squared sizes of `G − v̄` and `G − G_C` there, set after set."""
    part, num_sets = moments.part, moments.set_sizes.numel()
    starts, widths = part.starts_and_widths()
    set_of = torch.zeros_like(starts) if part.set_of_batch is None else part.set_of_batch
    batches = torch.bincount(set_of, minlength=num_sets)
    by_set = set_of.argsort(stable=True)
    set_of = set_of[by_set]
    rank = torch.arange(len(set_of), device=set_of.device) - (batches.cumsum(0) - batches)[set_of]
    count = batches[set_of]
    taken = count.clamp(max=_CANDIDATE_BATCHES)
    chosen = (count > 1) & (rank * taken % count < taken)
    rows = by_set[chosen]
    height = torch.minimum((_CANDIDATES + taken[chosen] - 1) // taken[chosen], widths[rows])
    slots = torch.arange(int(height.max()), device=rows.device)
    filled = slots < height.unsqueeze(1)
    tokens = part.order[starts[rows, None] + torch.minimum(slots, height.unsqueeze(1) - 1)]  # [B, r]
    covariance = of_set(part, moments.set_covariance).expand_as(moments.covariance)[rows]
    offset = -moments.value_offset[rows].transpose(0, 1).unsqueeze(2)  # v̄ − v̄_C, [H, B, 1, E]
    q = query[tokens].to(covariance.dtype)
    linear = scale * torch.einsum("brhd,bhde->hbre", q, covariance)
    control = offset + scale * torch.einsum("brhd,bhde->hbre", q, covariance - moments.covariance[rows])
    sizes = [x.double().square().sum(dim=-1)[:, filled] for x in (linear, control)]
    sizes = [torch.where(size.isfinite(), size, 0.0) for size in sizes]
    return tokens[filled], set_of[chosen].repeat_interleave(height), sizes


def _best(
    grams: Float[Tensor, "two g k h 4 4"],
    least: Float[Tensor, "g h"],
    rounding: Float[Tensor, "g h"],
    debias: Float[Tensor, " k"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(δ, μ, β, ν) `[G, H]` from the products of the columns and the target, of two halves of the anchors.

    Columns are scaled to one length, but one of rounding size (`least`, against the spread of the values) is none. What
    is fitted to one half is judged by the other; where that is no better than none at all, but for an error of the size
    of `rounding`, none is taken.
    """
    whole = grams.sum(dim=0)
    length = whole.diagonal(dim1=-2, dim2=-1)[..., :3].sqrt()  # [G, K, H, 3]
    length = torch.maximum(length, least[:, None, :, None]).clamp(min=torch.finfo(torch.float64).tiny)
    ridge = _RIDGE * torch.eye(3, dtype=grams.dtype, device=grams.device)

    def solve(gram: Tensor) -> Tensor:
        products = gram[..., :3, :3] / length.unsqueeze(-1) / length.unsqueeze(-2)
        return torch.linalg.solve_ex(products + ridge, gram[..., :3, 3] / length).result / length

    def loss(gram: Tensor, by: Tensor) -> Tensor:
        tried = torch.cat([-by, torch.ones_like(by[..., :1])], dim=-1)
        return torch.einsum("...i,...ij,...j->...", tried, gram, tried)

    judged = loss(grams[1], solve(grams[0])) + loss(grams[0], solve(grams[1]))
    judged = torch.where(judged.isfinite(), judged + rounding.unsqueeze(1), torch.inf)
    losses = torch.cat([whole[..., 3, 3], judged], dim=1)  # [G, 2 K, H]
    best = losses.argmin(dim=1)  # the first of equals: debiased, and nothing added
    correction = solve(whole)
    correction = torch.cat([torch.zeros_like(correction), correction], dim=1)
    mu, beta, nu = correction.gather(1, best[:, None, :, None].expand(-1, 1, -1, 3)).squeeze(1).unbind(-1)
    return debias[best % len(debias)], 1 + mu, beta, nu
