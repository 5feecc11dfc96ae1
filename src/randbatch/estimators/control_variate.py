"""In-batch attention corrected by mean fields: a control variate whose weights are fitted to a few exact tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from randbatch._shapes import Float
from randbatch.estimators.anchors import fit_weights
from randbatch.estimators.in_batch import plain, refuse_linear
from randbatch.estimators.mean_field import Moments, add_mean_field
from randbatch.estimators.met import attend_to_met, have_met_all
from randbatch.interactions import Options
from randbatch.orthogonal import OrthogonalRounds, Rounds
from randbatch.partition import Partition

__all__ = ["corrected"]


def corrected(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    rounds: Rounds,
    interaction: str,
    options: Options,
) -> Float[Tensor, "n h dv"]:
    """`ŷ = G + μ (A_δ − G) + ν (G − G_C) + λ (G − v̄)`, with weights for each head that need no label.

    A_δ is attention to the tokens that were met (δ = 0 plain, 1 debiased); `G_S(q) = v̄_S + scale · Cov_S(v, k) q`
    is the mean field of the batch C, or of the whole set: the attention of a Gaussian cloud with the same moments.
    Where attention is soft, G is nearly all of it, and G − G_C removes most of what the choice of the batch did to A.
    (δ, μ, ν, λ) are fitted by least squares to the exact attention of S = 64 sampled tokens, S · N · D operations, and
    have no gradient. Where all pairs have met, ŷ is A.
    """
    refuse_linear("corrected", interaction)
    first = rounds if isinstance(rounds, Partition) else next(iter(rounds))
    if first.is_whole:
        return plain(query, key, value, first, interaction, options)  # full attention
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the moments
        if not isinstance(rounds, Partition):
            return _correct(query, key, value, rounds, first, options)
        # moved once: the moments need batch order as much as the attention does
        query, key, value = (rounds.pack(tensor) for tensor in (query, key, value))
        packed = rounds.packed()
        return rounds.unpack(_correct(query, key, value, packed, packed, options))


def _correct(query: Tensor, key: Tensor, value: Tensor, rounds: Rounds, first: Partition, options: Options) -> Tensor:
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
    parts = [rounds] if isinstance(rounds, Partition) else rounds
    moments = Moments.of(first, key, value)
    weights = fit_weights(query, key, value, parts, moments, scale)
    local = attend_to_met(query, key, value, rounds, options, weights.debias)
    of_set = 1 - weights.mu + weights.nu
    coefficients = of_set, of_set + weights.lam, weights.nu
    if isinstance(rounds, Partition):
        out = add_mean_field(query, key, value, local, moments, scale, (weights.mu, *coefficients))
        if first.set_sizes is None:
            return out  # one set in several batches: no token met all
    else:
        out = _add_rounds(query, key, value, weights.mu.unsqueeze(1) * local, rounds, scale, coefficients)
    return torch.where(have_met_all(parts)[:, None, None], local, out.to(local.dtype))


def _add_rounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    rounds: OrthogonalRounds,
    scale: float,
    coefficients: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The mean fields of all rounds, averaged; each is computed again in backward, so that memory does not grow."""
    share = 1 / sum(1 for _ in rounds)
    alpha, beta, nu = (share * weight for weight in coefficients)
    weights = torch.zeros_like(alpha), alpha, beta, nu

    def field(query: Tensor, key: Tensor, value: Tensor, part: Partition) -> Tensor:
        return add_mean_field(query, key, value, value, Moments.of(part, key, value), scale, weights)

    for part in rounds:
        more: Any = checkpoint(field, query, key, value, part, use_reentrant=False, preserve_rng_state=False)
        out = out + more
    return out
