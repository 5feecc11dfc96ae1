"""What the particles of a set do to each other, and the sum over a set in pieces that fit into memory.

A set is a random batch or the whole system: the same code computes both. Shape letters: B sets, m particles in each,
n of them that are looked at, S columns of a particle's state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from randbatch._shapes import Float, Int

__all__ = ["Interaction", "Sets", "force_on_all"]

_PAIRS = 2**18  # held at a time: few enough to stay in the cache
_ROWS = 32  # at least, however long they are: fewer leave the matrix product idle
_PAIRS_OF_ACCELERATOR = 2**26  # enough to keep it busy


@dataclass(frozen=True, eq=False)
class Sets:
    """Sets of particles, each standing for the population it was drawn from.

    Attributes:
        x: states `[B, m, S]`.
        population: N, the particles that there are; m = N where the sets are whole.
        weights: `[B, m]`, how much each particle counts for the others. None: 1 each.
        species: integers `[B, m]`, the kind of each particle. None: one kind.
    """

    x: Float[Tensor, "b m s"]
    population: int
    weights: Float[Tensor, "b m"] | None = None
    species: Int[Tensor, "b m"] | None = None

    @property
    def others(self) -> int:
        """How many others a particle meets, m − 1; 1 where it is alone, for a division of nothing."""
        return max(self.x.shape[1] - 1, 1)

    @property
    def stands_for(self) -> float:
        """κ = (N − 1)/(m − 1), how many particles of the population each other one stands for; 1 in a whole set."""
        return (self.population - 1) / self.others if self.x.shape[1] < self.population else 1.0

    def part(self, start: int, stop: int) -> Sets:
        """Some of the sets, as views."""
        weights, species = (None if mark is None else mark[start:stop] for mark in (self.weights, self.species))
        return Sets(self.x[start:stop], self.population, weights, species)


class Interaction(ABC):
    """The force of a set of particles on its members; make your own by writing `force`.

    An interaction is unbiased under random batches if its force is a mean over the *other* members, `1/(m−1) Σ_{j≠i}`,
    or is corrected by `sets.stands_for`.

    Attributes:
        takes_weights: whether `force` looks at `sets.weights`.
        takes_species: whether it looks at `sets.species`.

    Example:
        >>> class ToTheMiddle(Interaction):
        ...     def force(self, sets, rows):
        ...         x = sets.x
        ...         return (x.sum(dim=1, keepdim=True) - x)[:, rows] / sets.others - x[:, rows]
        >>> ToTheMiddle().force(Sets(torch.tensor([[[0.0], [1.0], [5.0]]]), population=3), slice(0, 3)).flatten()
        tensor([ 3.0000,  1.5000, -4.5000])
    """

    takes_weights: ClassVar[bool] = False
    takes_species: ClassVar[bool] = False

    @abstractmethod
    def force(self, sets: Sets, rows: slice) -> Float[Tensor, "b n s"]:
        """The force on the particles `rows` of every set from its whole set, `[B, n, S]`."""

    def flow(self, sets: Sets, tau: float) -> Float[Tensor, "b m s"] | None:
        """The states after a time `tau` of this interaction alone, exactly; None where no closed form is known."""
        return None


def force_on_all(interaction: Interaction, sets: Sets) -> Float[Tensor, "b m s"]:
    """The force on every particle, `[B, m, S]`, some sets or some rows of a set at a time: O(B m) memory."""
    count, size, _ = sets.x.shape
    pairs = _PAIRS if sets.x.device.type == "cpu" else _PAIRS_OF_ACCELERATOR
    together = max(1, pairs // size**2)
    height = max(_ROWS, pairs // size)
    forces: list[Tensor] = []
    for start in range(0, count, together):
        some = sets.part(start, start + together)
        rows = [interaction.force(some, slice(row, min(row + height, size))) for row in range(0, size, height)]
        forces.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
    return forces[0] if len(forces) == 1 else torch.cat(forces)
