"""What a system of particles is: what they do to each other, what each does alone, and where they live.

A step is a Lie–Trotter splitting: the interaction first, which alone is approximated by random batches, and then the
motion of each particle by itself. A layer of a transformer is such a step: attention, then the feed-forward map.

Shape letters: R realisations, N particles, B sets of m particles, S columns of a particle's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._shapes import Float, Int, Shaped
from randbatch.particles.interaction import Interaction, Sets, force_on_all

__all__ = ["LAYER_NORM", "SPHERE", "Langevin", "Manifold", "MultiplicativeNoise", "System"]


@dataclass(frozen=True)
class Manifold:
    """Where the states live.

    Attributes:
        tangent: from states and velocities, each `[…, S]`, to the velocities along the manifold.
        retract: from states `[…, S]` near the manifold to states on it.
    """

    tangent: Callable[[Tensor, Tensor], Tensor]
    retract: Callable[[Tensor], Tensor]


def _off_radius(x: Tensor, velocity: Tensor) -> Tensor:
    return velocity - (velocity * x).sum(dim=-1, keepdim=True) * x


def _as_it_is(x: Tensor, velocity: Tensor) -> Tensor:
    return velocity


SPHERE = Manifold(_off_radius, lambda x: F.normalize(x, dim=-1))
"""The unit sphere: velocities are projected by `I − x xᵀ`, states divided by their norm."""

LAYER_NORM = Manifold(_as_it_is, lambda x: F.layer_norm(x, x.shape[-1:]))
"""Layer norm without weights after each part of a step, as in a post-norm transformer: mean 0, variance 1."""


@dataclass(frozen=True, eq=False)
class System:
    """`dx_i = F_i(x) dt + b(x_i) dt + σ(x_i) dB_i`, F the interaction, b the confinement.

    Every step is F, by its exact solution in the set where there is one and by Euler otherwise, and then b and σ by
    Euler–Maruyama; on a manifold each is followed by the retraction. Weak order 1; override `alone` where the motion of
    a single particle can be solved exactly.

    Args:
        interaction: F; random batches replace this part alone.
        confinement: b = −∇V, from states `[R, N, S]` to velocities of that shape. Default: none.
        diffusion: σ, a number, or a function from states to factors that multiply `dB` (Itô). Default: 0, no noise.
        manifold: where the states live. Default: ℝˢ.
        weights: `[N]`, how much each particle counts for the others, for interactions that take weights. Default: 1.
        species: integers `[N]`, the kind of each particle, for interactions that take species. Default: one kind.

    Raises:
        ValueError: weights or species of another shape than `[N]`, or an interaction that would not look at them.

    Example:
        >>> from randbatch.particles import LinearForce
        >>> System(LinearForce(), confinement=lambda x: -x, diffusion=0.5).noise_columns(3)
        3
    """

    interaction: Interaction
    confinement: Callable[[Tensor], Tensor] | None = None
    diffusion: float | Callable[[Tensor], Tensor] = 0.0
    manifold: Manifold | None = None
    weights: Float[Tensor, " n"] | None = None
    species: Int[Tensor, " n"] | None = None

    even_columns: ClassVar[bool] = False  # whether a state is a position and a velocity

    def __post_init__(self) -> None:
        for name, given, taken in (
            ("weights", self.weights, self.interaction.takes_weights),
            ("species", self.species, self.interaction.takes_species),
        ):
            if given is not None and not taken:
                raise ValueError(f"{name} must be None: {type(self.interaction).__name__} does not look at them")
            if given is not None and given.dim() != 1:
                raise ValueError(f"{name} must have shape [N], got {list(given.shape)}")
        if not callable(self.diffusion) and not math.isfinite(self.diffusion):
            raise ValueError(f"diffusion must be finite, got {self.diffusion}")

    def noise_columns(self, columns: int) -> int:
        """How many Brownian motions drive a particle whose state has so many columns; 0 without noise."""
        return columns if callable(self.diffusion) or self.diffusion else 0

    def together(self, sets: Sets, tau: float) -> Float[Tensor, "b m s"]:
        """The states after a time `tau` of the interaction alone."""
        moved = self.interaction.flow(sets, tau)
        if moved is None:
            force = force_on_all(self.interaction, sets)
            force = force if self.manifold is None else self.manifold.tangent(sets.x, force)
            moved = torch.add(sets.x, force, alpha=tau)
        return moved if self.manifold is None else self.manifold.retract(moved)

    def alone(
        self, x: Float[Tensor, "*sets s"], tau: float, noise: Float[Tensor, "*sets k"] | None
    ) -> Float[Tensor, "*sets s"]:
        """The states after a time `tau` without the interaction; `noise` is the increment of the Brownian motions."""
        if self.confinement is None and noise is None:
            return x
        change = torch.zeros_like(x) if self.confinement is None else self.confinement(x) * tau
        if noise is not None:
            change = change + noise * (self.diffusion(x) if callable(self.diffusion) else self.diffusion)
        if self.manifold is None:
            return x + change
        return self.manifold.retract(x + self.manifold.tangent(x, change))


@dataclass(frozen=True, eq=False)
class MultiplicativeNoise(System):
    """`dx_i = F_i(x) dt + σ x_i dB_i` (Itô) with a constant σ, solved as `x exp(σ ΔB − σ² τ/2)`: x keeps its sign.

    Raises:
        ValueError: `diffusion` is not a number, or a confinement or a manifold is given.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if callable(self.diffusion) or self.confinement is not None or self.manifold is not None:
            raise ValueError("MultiplicativeNoise takes a number as diffusion, and no confinement and no manifold")

    def alone(
        self, x: Float[Tensor, "*sets s"], tau: float, noise: Float[Tensor, "*sets s"] | None
    ) -> Float[Tensor, "*sets s"]:
        """The states after a time `tau` of the noise."""
        if noise is None or callable(self.diffusion):
            return x
        return x * torch.exp(self.diffusion * noise - 0.5 * self.diffusion**2 * tau)


@dataclass(frozen=True, eq=False)
class Langevin(System):
    """`dx_i = v_i dt`, `dv_i = F_i(x) dt + b(x_i) dt − γ v_i dt + √(2 γ T) dB_i`; a state is `(x_i, v_i)` in one row.

    A step kicks the velocities by F and b, solves friction and noise exactly, and moves the positions by the new
    velocities: with γ = 0 it is symplectic. The interaction and the confinement see positions alone, `[…, D]`. For a
    force on positions and velocities take a `System` whose interaction gives `(0, F)`, as `Alignment` does.

    Args:
        friction: γ >= 0. Default: 0, Hamilton's equations.
        temperature: T >= 0. Default: 0.

    Raises:
        ValueError: γ or T is negative, or `diffusion` or a manifold is given.

    Source: Jin, Li, Sun, arXiv 2011.10778 (random batches for second-order systems).
    """

    friction: float = 0.0
    temperature: float = 0.0

    even_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("friction", self.friction), ("temperature", self.temperature)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        if callable(self.diffusion) or self.diffusion or self.manifold is not None:
            raise ValueError("Langevin takes friction and temperature, and no diffusion and no manifold")

    def noise_columns(self, columns: int) -> int:
        """One Brownian motion for each velocity."""
        return columns // 2 if self.friction and self.temperature else 0

    def together(self, sets: Sets, tau: float) -> Float[Tensor, "b m s"]:
        """The states after a kick of the velocities by the interaction."""
        x, v = sets.x.chunk(2, dim=-1)
        force = force_on_all(self.interaction, Sets(x, sets.population, sets.weights, sets.species))
        return torch.cat([x, torch.add(v, force, alpha=tau)], dim=-1)

    def alone(
        self, x: Float[Tensor, "*sets s"], tau: float, noise: Shaped[Tensor, "*sets k"] | None
    ) -> Float[Tensor, "*sets s"]:
        """The states after confinement, friction, noise and the motion along the velocities."""
        x, v = x.chunk(2, dim=-1)
        if self.confinement is not None:
            v = v + self.confinement(x) * tau
        v = v * math.exp(-self.friction * tau)
        if noise is not None:
            v = v + noise * math.sqrt(-self.temperature * math.expm1(-2 * self.friction * tau) / tau)
        return torch.cat([x + v * tau, v], dim=-1)
