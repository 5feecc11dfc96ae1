"""In-batch attention corrected by mean fields: a control variate whose weights are fitted to a few exact tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from randbatch._shapes import Float
from randbatch.estimators.anchors import fit_weights
from randbatch.estimators.in_batch import plain, refuse_linear
from randbatch.estimators.mean_field import Moments, add_mean_field
from randbatch.estimators.met import attend_to_met, have_met_all
from randbatch.interactions import Options
from randbatch.orthogonal import Rounds
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
    if isinstance(rounds, Partition):
        parts, first = [rounds], rounds
    else:
        parts, first = rounds, next(iter(rounds))
    num_sets = 1 if first.set_sizes is None else first.set_sizes.numel()
    if first.num_batches <= num_sets:  # every set in one batch: full attention
        return plain(query, key, value, first, interaction, options)
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
    moments = Moments.of(first, key, value)
    weights = fit_weights(query, key, value, parts, moments, scale)
    local = attend_to_met(query, key, value, rounds, options, weights.debias)
    share = 1 / sum(1 for _ in parts)
    of_set = [weights.mu.new_ones(()) - weights.mu + weights.nu, weights.nu]
    out, of_local = local, weights.mu
    for part in parts:
        coefficients = (of_local, share * of_set[0], share * (of_set[0] + weights.lam), share * of_set[1])
        out = add_mean_field(
            query, key, value, out, moments if part is first else Moments.of(part, key, value), scale, coefficients
        )
        of_local = torch.ones_like(of_local)
    if isinstance(rounds, Partition) and num_sets == 1:
        return out  # there is more than one batch, so no token met all
    return torch.where(have_met_all(parts)[:, None, None], local, out)
