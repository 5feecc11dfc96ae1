"""In-batch attention corrected by mean fields: a control variate whose weights are fitted to a few exact tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from randbatch._autograd import refuse_transforms
from randbatch._shapes import Float, Shaped
from randbatch.estimators.anchors import fit_weights
from randbatch.estimators.in_batch import plain, refuse_linear
from randbatch.estimators.mean_field import Moments, add_mean_field, of_set, sets_that_meet, value_range
from randbatch.estimators.met import attend_to_met, have_met_all, log_kappa
from randbatch.interactions import Options
from randbatch.kernels import Problem, pick_backend
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
    """`ŷ = v̄ + μ (A_δ − v̄) + β (G − v̄) + ν (G − G_C)`, with weights of each set and head that need no label.

    A_δ is attention to the tokens that were met (δ = 0 plain, 1 debiased); `G_S(q) = v̄_S + scale · Cov_S(v, k) q`
    is the mean field of the batch C, or of the whole set: the attention of a Gaussian cloud with the same moments.
    Where attention is soft, G is nearly all of it, and G − G_C removes most of what the choice of the batch did to A.
    (δ, μ, β, ν) are fitted by least squares to the exact attention of at most 64 sampled tokens of the set, 64 · N · D
    operations, and have no gradient; where what is fitted to half of them does not hold for the others, it is A alone.
    Exact attention is a weighted mean of values: what lies beyond all of them is brought back, and so nearer to it.
    Where all pairs have met, ŷ is A.

    Raises:
        NotImplementedError: inside a transform of `torch.func` or forward-mode differentiation; a second derivative.
    """
    refuse_linear("corrected", interaction)
    first = rounds if isinstance(rounds, Partition) else next(iter(rounds))
    if first.is_whole:
        return plain(query, key, value, first, interaction, options)  # full attention
    refuse_transforms("estimator 'corrected'", "take 'plain' or 'debiased'")
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
    local = _attend(query, key, value, rounds, first, options, weights.debias)
    shift = 1 - weights.mu + weights.nu
    coefficients = shift, weights.beta + weights.nu, weights.nu
    if isinstance(rounds, Partition):
        out = add_mean_field(query, key, value, local, moments, scale, (weights.mu, *coefficients))
    else:
        out = _of_tokens(weights.mu, first).unsqueeze(2) * local
        out = _add_rounds(query, key, value, out, rounds, scale, coefficients)
    out = torch.clamp(out.to(local.dtype), *(_of_tokens(bound, first) for bound in value_range(first, value)))
    if isinstance(rounds, Partition) and first.set_sizes is None:
        return out  # one set in several batches: no token met all
    return torch.where(have_met_all(parts)[:, None, None], local, out)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rounds: Rounds,
    first: Partition,
    options: Options,
    debias: Float[Tensor, "g h"],
) -> Float[Tensor, "n h e"]:
    """A_δ with the δ, 0 or 1, of each set and head."""
    if first.set_of_batch is None or first.set_sizes is None:
        return attend_to_met(query, key, value, rounds, options, debias[0])
    if not isinstance(rounds, Partition):
        plain, debiased = (attend_to_met(query, key, value, rounds, options, delta) for delta in (0.0, 1.0))
        return torch.where(_of_tokens(debias, first).unsqueeze(2) == 1, debiased, plain)
    kappa = log_kappa(first.set_sizes[first.set_of_batch] - 1, first.starts_and_widths()[1] - 1)
    own_shift = -kappa.to(debias.dtype).unsqueeze(1) * of_set(first, debias)
    problem = Problem.of(query, value, options.scale, options.dropout_p)
    backend = pick_backend(options.backend, problem)
    return backend.attend(query, key, value, first, problem, own_shift.split([rows for rows, _ in first.groups]))[0]


def _of_tokens(x: Shaped[Tensor, "g ..."], part: Partition) -> Shaped[Tensor, "n_or_1 ..."]:
    """What belongs to a set, to each of its tokens."""
    return x if part.set_of_batch is None else part.unpack(part.spread(of_set(part, x)))


def _add_rounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    rounds: OrthogonalRounds,
    scale: float,
    coefficients: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The mean fields of all rounds of each set, averaged; each is computed again in backward: memory does not grow."""
    number = sum(sets_that_meet(part).long() for part in rounds)

    def field(query: Tensor, key: Tensor, value: Tensor, part: Partition) -> Tensor:
        share = (sets_that_meet(part) / torch.as_tensor(number).clamp(min=1)).unsqueeze(1)
        alpha, beta, nu = (share.to(weight.dtype) * weight for weight in coefficients)
        weights = torch.zeros_like(alpha), alpha, beta, nu
        return add_mean_field(query, key, value, value, Moments.of(part, key, value), scale, weights)

    for part in rounds:
        more: Any = checkpoint(field, query, key, value, part, use_reentrant=False, preserve_rng_state=False)
        out = out + more
    return out
