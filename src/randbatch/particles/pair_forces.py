"""Pair forces: linear, radial, repulsion by a power of the distance, alignment of velocities.

Shape letters: B sets, m particles in each, n of them that are looked at, D dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from randbatch._checks import check_positive
from randbatch._shapes import Float
from randbatch.particles.interaction import Interaction, Sets

__all__ = ["Alignment", "LinearForce", "PowerRepulsion", "RadialForce"]

_FEW = 16  # in sets of so many a difference is cheaper than a product of points, and a mean dearer than one of sets
_FLAT = 8  # in so many dimensions differences take no longer than a product of points, and lose no digits


@dataclass(frozen=True, eq=False)
class LinearForce(Interaction):
    """`F_i = −κ/(m−1) Σ_{j≠i} (x_i − x_j)`, by the mean of the set: O(m), and solved exactly.

    In a set the mean stays and distances to it shrink by `exp(−κ m τ/(m−1))`.

    Args:
        strength: κ > 0.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)

    def force(self, sets: Sets, rows: slice) -> Float[Tensor, "b n d"]:
        """The force on the particles `rows` of every set, `[B, n, D]`."""
        x = _centred(sets.x)
        return (x.mean(dim=1, keepdim=True) - x[:, rows]) * (self.strength * x.shape[1] / sets.others)

    def flow(self, sets: Sets, tau: float) -> Float[Tensor, "b m d"]:
        """The states after a time `tau` of this force alone, exactly."""
        size = sets.x.shape[1]
        decay = math.exp(-self.strength * size * tau / sets.others)
        first = sets.x[:, :1]  # far from the origin, sums and products would lose digits, and move the mean
        x = sets.x - first
        if size <= _FEW:  # one product in place of four passes along short rows
            mix = torch.full((size, size), (1 - decay) / size, dtype=x.dtype, device=x.device)
            mix.diagonal().add_(decay)
            return first + mix @ x
        mean = x.mean(dim=1, keepdim=True)
        return first + (mean + (x - mean) * decay)


@dataclass(frozen=True, eq=False)
class RadialForce(Interaction):
    """`F_i = 1/(m−1) Σ_{j≠i} a[s_i, s_j] w_j g(|x_i − x_j|²) (x_i − x_j)`, positive g pushes apart.

    The matrix of all `g` is one matrix product away from the force, `x_i Σ_j G_ij − Σ_j G_ij x_j`, with coordinates
    about a place in the set: no tensor of differences `[n, m, D]` is ever made.

    Args:
        profile: g, from squared distances to numbers, both of any shape. What it gives at the distance 0 of a particle
            to itself is ignored; two particles at one place meet whatever it gives there.
        singular: whether g changes fast near 0. Distances in large sets of more than 8 dimensions then come from
            differences too, and not from `|x|² + |y|² − 2 x·y`, which is faster and loses digits of small distances.
        strength: `[species, species]`, a; the row is the species that feels. Default: 1.

    Example:
        >>> spring = RadialForce(lambda squared: -torch.ones_like(squared))
        >>> spring.force(Sets(torch.tensor([[[0.0], [1.0], [5.0]]]), population=3), slice(0, 3)).flatten()
        tensor([ 3.0000,  1.5000, -4.5000])
    """

    profile: Callable[[Tensor], Tensor]
    singular: bool = False
    strength: Float[Tensor, "k k"] | None = None

    takes_weights: ClassVar[bool] = True
    takes_species: ClassVar[bool] = True

    def force(self, sets: Sets, rows: slice) -> Float[Tensor, "b n d"]:
        """The force on the particles `rows` of every set, `[B, n, D]`."""
        factors, x = self.factors(sets, rows), _centred(sets.x)
        return factors.sum(dim=2, keepdim=True) * x[:, rows] - factors @ x

    def factors(self, sets: Sets, rows: slice) -> Float[Tensor, "b n m"]:
        """G, what multiplies each difference `x_i − x_j`, `[B, n, m]`; 0 for a particle and itself."""
        x = sets.x
        factors = self.profile(_squared_distances(x, rows, self.singular))
        if sets.weights is not None:
            factors = factors * sets.weights.unsqueeze(1)
        if self.strength is not None and sets.species is not None:
            pairs = sets.species[:, rows].unsqueeze(2), sets.species.unsqueeze(1)
            factors = factors * self.strength.to(x)[pairs]
        factors = factors / sets.others
        factors.diagonal(offset=rows.start, dim1=1, dim2=2).zero_()
        return factors


def _centred(x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
    """Coordinates about a place in each set: far from the origin sums and products would lose digits."""
    x = x - x[:, :1]  # a sum of large numbers may overflow
    return x if x.shape[1] <= _FEW else x - x.mean(dim=1, keepdim=True)


def _squared_distances(x: Float[Tensor, "b m d"], rows: slice, exact: bool) -> Float[Tensor, "b n m"]:
    """Of the particles `rows` from all of their sets."""
    if x.shape[1] > _FEW and x.shape[2] <= _FLAT:
        axes = x.mT.contiguous()  # the loop runs along particles
        first, *others = ((axis[:, rows].unsqueeze(2) - axis.unsqueeze(1)).square_() for axis in axes.unbind(1))
        return functools.reduce(Tensor.add_, others, first)
    if exact or x.shape[1] <= _FEW:
        return torch.cdist(x[:, rows], x, compute_mode="donot_use_mm_for_euclid_dist").square_()
    y = _centred(x)
    x = y[:, rows]
    squares = x.square().sum(dim=2, keepdim=True) + y.square().sum(dim=2).unsqueeze(1)
    return torch.baddbmm(squares, x, y.mT, alpha=-2).clamp_(min=0)


@dataclass(frozen=True, eq=False)
class PowerRepulsion(Interaction):
    """`F_i = 1/(m−1) Σ_{j≠i} (x_i − x_j)/|x_i − x_j|ˢ`, singular; two particles are solved exactly.

    A pair keeps its mean and its direction, and its distance grows as `rˢ → rˢ + 2 s τ`: with random batches of two no
    step is too large, while Euler's step throws a close pair far apart.

    Args:
        power: s > 0; 2 is the repulsion of eigenvalues on the line, 3 Coulomb's in space.

    Raises:
        ValueError: s is not a finite number > 0.

    Source: Jin, Li, Liu, arXiv 1812.10575 (the splitting for Dyson Brownian motion).

    Example:
        >>> pair = Sets(torch.tensor([[[0.0, 0.0], [0.3, 0.4]]]), population=2)
        >>> moved = PowerRepulsion(2.0).flow(pair, tau=3.0)
        >>> float((moved[0, 0] - moved[0, 1]).square().sum())  # 0.25 + 4 τ
        12.25
    """

    power: float

    def __post_init__(self) -> None:
        check_positive("power", self.power)

    def force(self, sets: Sets, rows: slice) -> Float[Tensor, "b n d"]:
        """The force on the particles `rows` of every set, `[B, n, D]`."""
        return RadialForce(lambda squared: squared.pow(-self.power / 2), singular=True).force(sets, rows)

    def flow(self, sets: Sets, tau: float) -> Float[Tensor, "b m d"] | None:
        """The states of pairs after a time `tau` of this force alone, exactly; None for larger sets."""
        x, power = sets.x, self.power
        if x.shape[1] > 2:
            return None
        if x.shape[1] < 2:
            return x
        gap = x[:, :1] - x[:, 1:]
        distance = gap.square().sum(dim=2, keepdim=True).sqrt()
        first_axis = torch.eye(1, x.shape[2], dtype=x.dtype, device=x.device)
        direction = torch.where(distance > 0, gap / distance, first_axis)  # two at one place part along it
        half = direction * (distance**power + 2 * power * tau) ** (1 / power) / 2
        mean = x.mean(dim=1, keepdim=True)
        return torch.cat([mean + half, mean - half], dim=1)


@dataclass(frozen=True, eq=False)
class Alignment(Interaction):
    """`dv_i/dt = 1/(m−1) Σ_{j≠i} ψ(|x_i − x_j|²) (v_j − v_i)`; a particle's state is `(x_i, v_i)`, side by side.

    Args:
        profile: ψ, from squared distances to numbers.

    Source: Cucker, Smale, "Emergent behavior in flocks", IEEE TAC 52 (2007).
    """

    profile: Callable[[Tensor], Tensor]

    def force(self, sets: Sets, rows: slice) -> Float[Tensor, "b n s"]:
        """Zeros for the positions, and the force on the velocities, `[B, n, 2 D]`."""
        x, v = sets.x.chunk(2, dim=2)
        near = self.profile(_squared_distances(x, rows, exact=False)) / sets.others
        v = _centred(v)
        pull = near @ v - near.sum(dim=2, keepdim=True) * v[:, rows]
        return torch.cat([torch.zeros_like(pull), pull], dim=2)
