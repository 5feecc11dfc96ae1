"""What an estimator is: how what tokens met in random batches stands for their whole set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from randbatch._errors import InvalidValue
from randbatch._shapes import Float, Shaped
from randbatch.interactions import Interaction, Options
from randbatch.interactions.base import Keyed
from randbatch.interactions.rounds import Projections
from randbatch.partition import Partition, Partitions

if TYPE_CHECKING:
    from randbatch.estimators.probe import Probe

__all__ = ["Estimator"]


class Estimator(Keyed):
    """How in-batch outputs estimate the interaction over the whole set.

    A subclass says which interactions it serves (`why_not`) and defines `in_batches` for one round. What it does not
    define is refused with a sentence, never something else.

    Attributes:
        color: of its curves in pictures.
        is_identity: whether one round gives the in-batch output as it is.
        can_chunk: whether a few batches can be computed at a time. False where all keys are needed at once.
        can_trace: whether `torch.compile` can look into one round of one set.
    """

    color: ClassVar[str] = "#7f7f7f"
    is_identity: ClassVar[bool] = False
    can_chunk: ClassVar[bool] = True
    can_trace: ClassVar[bool] = True

    def why_not(self, interaction: Interaction) -> str | None:
        """Why it cannot serve an interaction; None if it can."""
        return None

    def in_batches(
        self, interaction: Interaction, projected: Sequence[Shaped[Tensor, "n ..."]], part: Partition, options: Options
    ) -> Shaped[Tensor, "n ..."]:
        """The estimate from one round, in token order."""
        raise NotImplementedError(f"estimator {self.name!r} does not define `in_batches`")

    def over_rounds(
        self,
        interaction: Interaction,
        projections: Projections,
        rounds: Partitions,
        options: Options,
        chunk: int | None = None,
    ) -> Shaped[Tensor, "n ..."]:
        """The estimate from several rounds, in token order; `chunk` batches at a time if it is given."""
        raise InvalidValue(f"rounds must be 1 with estimator {self.name!r}, which has no rule for several")

    def observe(self, probe: Probe, part: Partition) -> None:
        """What a probe does for this estimator with one more round; what it keeps is in the probe's `states`."""

    def at_tokens(self, probe: Probe) -> Float[Tensor, "h s e"]:
        """The estimate at a few tokens, after the rounds that the probe has seen."""
        raise InvalidValue(f"estimator must be one that can be probed at a few tokens, got {self.name!r}")

    @property
    def can_probe(self) -> bool:
        """Whether its output at a few tokens can be known without the others."""
        return type(self).at_tokens is not Estimator.at_tokens
