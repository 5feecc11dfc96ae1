"""What is asked for by one call, whoever asks: the op, a layer, a wrapper or a converted module.

Shape letters: N tokens, B padded sets, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from randbatch._errors import InvalidValue
from randbatch._numerics import has_no_elements
from randbatch._shapes import Bool, Int
from randbatch.estimators import Estimator
from randbatch.interactions import Interaction, Options
from randbatch.interactions.rounds import Projections
from randbatch.partition import Partition, Partitions, any_partition
from randbatch.partition.orthogonal import draw_rounds
from randbatch.streaming import ChunkBatches
from randbatch.tolerance import RoundsChoice

__all__ = ["Call", "LinearProjections", "check_together"]

Observer = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], None]
"""Gets query, key, value, `batch` and scale."""


def check_together(
    interaction: Interaction,
    estimator: Estimator,
    options: Options,
    *,
    batch_size: int,
    rounds: int,
    tolerance: float | None,
    chunk_batches: ChunkBatches,
) -> None:
    """Refuse what has no meaning together: the one place for it.

    Raises:
        ValueError: the estimator cannot serve the interaction or be computed in chunks, rounds cannot be merged,
            batches are too small, the error cannot be measured, or an option means nothing to the interaction.
    """
    reason = estimator.why_not(interaction)
    if reason is not None:
        raise InvalidValue(f"estimator {estimator.name!r} cannot serve interaction {interaction.name!r}: {reason}")
    if chunk_batches is not None and not estimator.can_chunk:
        raise InvalidValue(
            f"chunk_batches must be None with estimator {estimator.name!r}, which needs the keys and values of all "
            f"batches at once; got {chunk_batches!r}"
        )
    if chunk_batches is not None and interaction.statistics:
        raise InvalidValue(
            f"chunk_batches must be None with interaction {interaction.name!r}, whose set statistics need all tokens "
            f"at once; got {chunk_batches!r}"
        )
    if rounds > 1 and not (interaction.can_merge or interaction.averages):
        raise InvalidValue(
            f"rounds must be 1 with interaction {interaction.name!r}, which has no rule to merge several "
            f"({interaction.kind.value}); got {rounds}"
        )
    if batch_size < interaction.smallest_batch:
        raise InvalidValue(
            f"batch_size must be at least {interaction.smallest_batch} with interaction {interaction.name!r}, got "
            f"{batch_size}"
        )
    if tolerance is not None and not interaction.is_exponential:
        raise InvalidValue(
            f"tolerance must be None with interaction {interaction.name!r}: it is for softmax attention, whose error "
            "can be measured; give rounds instead"
        )
    interaction.check_options(options)


@dataclass(frozen=True)
class LinearProjections(Projections):
    """Projections that are two matrices, of one tensor to query, key and value and of the attention to the output.

    Attributes:
        in_weight: `[3C, C]`.
        in_bias: `[3C]`, or None.
        out_weight: `[C, C]`.
        out_bias: `[C]`, or None.
    """

    in_weight: Any = None
    in_bias: Any = None
    out_weight: Any = None
    out_bias: Any = None


@dataclass
class Call:
    """One call.

    Attributes:
        projections: the tokens, flat `[N, …]` or in padded sets `[B, N, …]`, and what surrounds the interaction.
        interaction: what tokens do with those they meet.
        estimator: how that stands for the whole set.
        options: how to compute.
        batch_size: p.
        rounds: R.
        seed: of the partitions; None draws one from torch's default CPU generator.
        chunk_batches: batches at a time.
        exact: one batch holds each whole set.
        tolerance: as many rounds as keep the relative error below it.
        partition: to be used in place of drawing one.
        batch: `[N]`, the set of each flat token.
        padded: whether the tokens stand in padded sets.
        mask: `[B, N]`, True where a padded set has a token; None where it has one everywhere.
        mask_name: what the caller calls the mask.
        observer: gets what is attended to.
        on_choice: gets the rounds that `tolerance` chose.
    """

    projections: Projections
    interaction: Interaction
    estimator: Estimator
    options: Options
    batch_size: int = 2
    rounds: int = 1
    seed: int | None = None
    chunk_batches: ChunkBatches = None
    exact: bool = False
    tolerance: float | None = None
    partition: Partition | None = None
    batch: Int[Tensor, " n"] | None = None
    padded: bool = False
    mask: Bool[Tensor, "b n"] | None = None
    mask_name: str = "mask"
    observer: Observer | None = None
    on_choice: Callable[[RoundsChoice], None] | None = None

    @property
    def first(self) -> Tensor:
        """The first tensor of the tokens."""
        return self.projections.tensors[0]

    @property
    def several_sets(self) -> bool:
        """Whether tokens belong to several sets, or some rows to none."""
        return self.batch is not None or self.mask is not None or (self.padded and self.first.shape[0] > 1)

    def check(self) -> None:
        """Refuse what has no meaning together.

        Raises:
            ValueError: see `check_together`.
        """
        check_together(
            self.interaction, self.estimator, self.options, batch_size=self.batch_size, rounds=self.rounds,
            tolerance=self.tolerance, chunk_batches=self.chunk_batches,
        )  # fmt: skip

    def draw(self) -> Partitions:
        """The partitions of flat tokens."""
        if self.partition is not None:
            return self.partition
        tokens = self.first
        num_tokens = tokens.shape[0]
        batch_size = max(num_tokens, 2) if self.exact else self.batch_size
        if has_no_elements(tokens):
            return any_partition(num_tokens, batch_size, self.batch, tokens.device)
        rounds = 1 if self.exact else self.rounds
        return draw_rounds(
            num_tokens, batch_size, rounds, batch=self.batch, seed=self.seed, device=tokens.device
        )  # fmt: skip

    def but(self, **changes: Any) -> Call:
        """The same call with some changes."""
        return replace(self, **changes)
