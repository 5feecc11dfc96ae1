"""In-batch attention corrected by mean fields: a control variate whose weights are fitted to a few exact tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from randbatch._autograd import refuse_transforms
from randbatch._numerics import logit_scale
from randbatch._shapes import Bool, Float, Shaped
from randbatch.estimators.anchors import Anchors, fit_weights, set_field
from randbatch.estimators.base import Estimator
from randbatch.estimators.mean_field import Moments, add_mean_field, of_set, sets_that_meet, value_range
from randbatch.estimators.probe import SetsOf
from randbatch.interactions import Interaction, Options
from randbatch.interactions.rounds import Projections, merge_rounds
from randbatch.partition import Partition, Partitions

if TYPE_CHECKING:
    from randbatch.estimators.probe import Probe

__all__ = ["Corrected"]


class Corrected(Estimator):
    """`ŷ = v̄ + μ (A_δ − v̄) + β (G − v̄) + ν (G − G_C)`, with weights of each set and head that need no label.

    A_δ is attention to the tokens that were met (δ = 0 plain, 1 debiased); `G_S(q) = v̄_S + scale · Cov_S(v, k) q`
    is the mean field of the batch C, or of the whole set: the attention of a Gaussian cloud with the same moments.
    Where attention is soft, G is nearly all of it, and G − G_C removes most of what the choice of the batch did to A.
    (δ, μ, β, ν) are fitted by least squares to the exact attention of at most 64 sampled tokens of the set, 64 · N · D
    operations, and have no gradient; where what is fitted to half of them does not hold for the others, it is A alone.
    Exact attention is a weighted mean of values: what lies beyond all of them is brought back, and so nearer to it.
    Where all pairs have met, ŷ is A.

    It cannot run inside a transform of `torch.func` or forward-mode differentiation, and has no second derivative.
    """

    name = "corrected"
    color = "#1f77b4"
    can_chunk = False
    can_trace = False

    def why_not(self, interaction: Interaction) -> str | None:
        """The mean field is known for the weights of softmax."""
        if interaction.is_exponential:
            return None
        return "its mean field is that of the weights exp(scale · query·key)"

    def in_batches(
        self, interaction: Interaction, projected: Sequence[Shaped[Tensor, "n ..."]], part: Partition, options: Options
    ) -> Shaped[Tensor, "n ..."]:
        """One round."""
        if part.is_whole:
            return interaction.in_batches(part, projected, options)  # full attention
        refuse_transforms("estimator 'corrected'", "take 'plain' or 'debiased'")
        with torch.autocast(projected[0].device.type, enabled=False):  # autocast would round the moments
            # moved once: the moments need batch order as much as the attention does
            packed = part.packed()
            query, key, value = (part.pack(tensor) for tensor in projected)
            moments = Moments.of(packed, key, value)
            scale = logit_scale(options.scale, query.shape[-1])
            weights = fit_weights(query, key, value, packed, moments, scale)
            local = interaction.in_batches(packed, (query, key, value), options, weights.debias)
            coefficients = 1 - weights.mu + weights.nu, weights.beta + weights.nu, weights.nu
            out = add_mean_field(query, key, value, local, moments, scale, (weights.mu, *coefficients))
            out = _within_values(out.to(local.dtype), packed, value)
            if part.set_sizes is not None:  # of one set in several batches no token met all
                out = torch.where(_have_met_all(packed)[:, None, None], local, out)
            return part.unpack(out)

    def over_rounds(
        self,
        interaction: Interaction,
        projections: Projections,
        rounds: Partitions,
        options: Options,
        chunk: int | None = None,
    ) -> Shaped[Tensor, "n ..."]:
        """Several rounds: the moments and the anchors are those of the first, and mean fields are averaged."""
        assert chunk is None  # `check` refuses it
        query, key, value = projections.tensors
        first = rounds.first
        if first.is_whole:
            return interaction.in_batches(first, (query, key, value), options)
        refuse_transforms("estimator 'corrected'", "take 'plain' or 'debiased'")
        with torch.autocast(query.device.type, enabled=False):
            scale = logit_scale(options.scale, query.shape[-1])
            moments = Moments.of(first, key, value)
            weights = fit_weights(query, key, value, rounds, moments, scale)
            local = merge_rounds(interaction, projections, rounds, weights.debias, options)
            coefficients = 1 - weights.mu + weights.nu, weights.beta + weights.nu, weights.nu
            out = _of_tokens(weights.mu, first).unsqueeze(2) * local
            out = _add_rounds(query, key, value, out, rounds, scale, coefficients)
            out = _within_values(out.to(local.dtype), first, value)
            return torch.where(_have_met_all(rounds)[:, None, None], local, out)

    def observe(self, probe: Probe, part: Partition) -> None:
        """Moments and anchors are those of the first round; where every set is one batch there are none."""
        if probe.met.num_rounds == 0 and not part.is_whole:
            probe.states[self] = _Correction.of(probe, part)
        correction: _Correction | None = probe.states[self]
        if correction is not None:
            correction.anchors.at.add(part)

    def at_tokens(self, probe: Probe) -> Float[Tensor, "h s e"]:
        """The same at a few tokens; the anchors are other ones."""
        correction: _Correction | None = probe.states[self]
        if correction is None:
            return probe.met.local(0.0)  # every set in one batch: full attention
        weights = correction.anchors.fit().at(correction.sets)
        local = probe.met.local(weights.debias)
        out = weights.correct(local, correction.linear, probe.met.field, correction.mean)
        low, high = (bound.to(out.dtype) for bound in correction.bounds)
        return torch.where(probe.met.met_all.unsqueeze(-1), local, out.clamp(low, high))


class _Correction(NamedTuple):
    """What a probe needs of the whole set."""

    anchors: Anchors
    sets: SetsOf
    mean: Tensor
    linear: Tensor
    bounds: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, probe: Probe, part: Partition) -> _Correction:
        """From the first round."""
        query, key, value = probe.tensors
        moments = Moments.of(part, key, value)
        sets = SetsOf(part, probe.met.tokens)
        mean, linear = set_field(probe.met.query, moments, sets.own, probe.scale)
        heads = torch.arange(len(sets.own), device=sets.own.device).unsqueeze(1)
        low, high = (bound[sets.own, heads] for bound in value_range(part, value))
        return cls(Anchors(query, key, value, moments, probe.scale), sets, mean, linear, (low, high))


def _within_values(out: Tensor, part: Partition, value: Tensor) -> Tensor:
    return torch.clamp(out, *(_of_tokens(bound, part) for bound in value_range(part, value)))


def _have_met_all(rounds: Partitions) -> Bool[Tensor, " n"]:
    """Which tokens met every other of their set."""
    met = sum(part.unpack(part.count_met()) for part in rounds)
    first = rounds.first
    return torch.as_tensor(met == first.unpack(first.count_others()))


def _of_tokens(x: Shaped[Tensor, "g ..."], part: Partition) -> Shaped[Tensor, "n_or_1 ..."]:
    """What belongs to a set, to each of its tokens."""
    return x if part.set_of_batch is None else part.unpack(part.spread(of_set(part, x)))


def _add_rounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    rounds: Partitions,
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
