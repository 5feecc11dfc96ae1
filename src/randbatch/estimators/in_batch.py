"""The paper's estimator, and the same with a token's own weight no longer over-counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from randbatch._errors import InvalidValue
from randbatch._shapes import Float, Shaped
from randbatch.estimators.base import Estimator
from randbatch.interactions import Interaction, Options
from randbatch.interactions.rounds import Projections, average_rounds, merge_rounds
from randbatch.partition import Partition, Partitions

if TYPE_CHECKING:
    from randbatch.estimators.probe import Probe

__all__ = ["Debiased", "Plain"]


class _InBatch(Estimator):
    """`ŷ_i = (κ^δ Σ_{j∈S_i} w_ij v_j + w_ii v_i) / (κ^δ Σ_{j∈S_i} w_ij + w_ii)`, S_i the others that token i met.

    `κ = (n − 1) / |S_i|` for a set of n tokens.
    """

    debias: float
    """δ."""

    def in_batches(
        self, interaction: Interaction, projected: Sequence[Shaped[Tensor, "n ..."]], part: Partition, options: Options
    ) -> Shaped[Tensor, "n ..."]:
        """One round; where every set is one batch, κ is 1 and it is the full interaction."""
        if self.is_identity or part.is_whole:
            return interaction.in_batches(part, projected, options)
        return interaction.in_batches(part, projected, options, self.debias)

    def over_rounds(
        self,
        interaction: Interaction,
        projections: Projections,
        rounds: Partitions,
        options: Options,
        chunk: int | None = None,
    ) -> Shaped[Tensor, "n ..."]:
        """Sums are merged; where there are none, the outputs of independent partitions are averaged."""
        if interaction.can_merge:
            return merge_rounds(interaction, projections, rounds, self.debias, options, chunk)
        if interaction.averages and chunk is None:  # in chunks, `finish` comes first
            return average_rounds(interaction, projections.tensors, rounds.independent(), options)
        raise InvalidValue(
            f"rounds must be 1 with interaction {interaction.name!r} ({interaction.kind.value}), which has no rule to "
            "merge several"
        )

    def at_tokens(self, probe: Probe) -> Float[Tensor, "h s e"]:
        """Attention to the tokens that were met, with the own logit lowered by δ log κ."""
        return probe.met.local(self.debias)


class Plain(_InBatch):
    """The interaction over the tokens that were met, in place of the whole set: δ = 0.

    Source: Liu, Ma, Jin, Wang, arXiv 2511.06044.
    """

    name = "plain"
    color = "#d62728"
    debias = 0.0
    is_identity = True


class Debiased(_InBatch):
    """Plain, with the others weighted by `κ = (n − 1) / |S_i|`: δ = 1.

    A token always meets itself, but only `|S_i|` of its n − 1 others. A sum becomes unbiased; of a ratio numerator and
    denominator do, and the ratio keeps a bias of O(1/p).
    """

    name = "debiased"
    color = "#ff7f0e"
    debias = 1.0

    def why_not(self, interaction: Interaction) -> str | None:
        """It needs a sum over pairs."""
        if interaction.can_merge:
            return None
        return f"it weighs the other tokens of a sum over pairs, and this is of the kind {interaction.kind.value!r}"
