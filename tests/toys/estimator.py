"""An estimator between plain and debiased."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from randbatch import estimators
from randbatch.estimators.probe import Probe
from randbatch.interactions import Interaction, Options
from randbatch.interactions.rounds import Projections, merge_rounds
from randbatch.partition import Partition, Partitions


@estimators.register("halfway")
class Halfway(estimators.Estimator):
    """The others that were met weigh √κ as much, κ = (n − 1) / |S_i|: δ = 1/2."""

    def why_not(self, interaction: Interaction) -> str | None:
        """It needs a sum over pairs."""
        return None if interaction.can_merge else "there are no others to be weighed"

    def in_batches(
        self, interaction: Interaction, projected: Sequence[Tensor], part: Partition, options: Options
    ) -> Tensor:
        """One round."""
        return interaction.in_batches(part, projected, options, 0.5)

    def over_rounds(
        self, interaction: Interaction, projections: Projections, rounds: Partitions, options: Options,
        chunk: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Several rounds."""
        return merge_rounds(interaction, projections, rounds, 0.5, options, chunk)

    def at_tokens(self, probe: Probe) -> Tensor:
        return probe.met.local(0.5)
