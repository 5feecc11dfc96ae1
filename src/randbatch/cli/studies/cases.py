"""The systems that the commands know by name, each with a start, a time, and what is known of it.

Shape letters: R realisations, N particles, S columns of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch import particles
from randbatch._shapes import Float
from randbatch.particles import System
from randbatch.particles.convergence import second_moment

__all__ = ["CASES", "Case", "start_of"]


@dataclass(frozen=True)
class Case:
    """A system, its defaults and how its states are drawn.

    Attributes:
        system: from N to the system.
        start: from R, N and a generator to states `[R, N, S]`.
        view: how states are drawn: `"line"`, `"plane"`, `"sphere"`, `"arrows"` or `"cosines"`.
        num_particles: N of a convergence study, where the direct sum must run in small steps.
        t1: its end.
        observable: of its weak error, from states `[R, N, S]` to `[R]`.
        lipschitz: whether the interaction is unbiased and its pair force bounded and Lipschitz: then strong rate ½ and
            weak rate 1 are proved for RBM-1 (some theorems also ask for a confinement that is strong enough).
        why_not: why no rates can be measured; empty where they can.
        many: N of a simulation.
        batch_size: p of a simulation.
        dt: step of a simulation.
        long: its end.
        law: from a time and places to the known density, for particles on a line.
    """

    system: Callable[[int], System]
    start: Callable[[int, int, torch.Generator], Tensor]
    view: str
    num_particles: int = 64
    t1: float = 1.0
    observable: Callable[[Tensor], Tensor] = second_moment
    lipschitz: bool = True
    why_not: str = ""
    many: int = 1000
    batch_size: int = 2
    dt: float = 0.05
    long: float = 5.0
    law: Callable[[float, Tensor], Tensor] | None = None


def start_of(case: Case, realisations: int, num_particles: int, seed: int) -> Float[Tensor, "r n s"]:
    """The states at time 0, float64."""
    return case.start(realisations, num_particles, torch.Generator().manual_seed(seed))


def _normal(columns: int) -> Callable[[int, int, torch.Generator], Tensor]:
    def start(realisations: int, size: int, generator: torch.Generator) -> Tensor:
        return torch.randn(realisations, size, columns, generator=generator, dtype=torch.float64)

    return start


def _on_sphere(columns: int) -> Callable[[int, int, torch.Generator], Tensor]:
    def start(realisations: int, size: int, generator: torch.Generator) -> Tensor:
        return F.normalize(_normal(columns)(realisations, size, generator), dim=-1)

    return start


def _uniform(columns: int, width: float) -> Callable[[int, int, torch.Generator], Tensor]:
    def start(realisations: int, size: int, generator: torch.Generator) -> Tensor:
        return width * torch.rand(realisations, size, columns, generator=generator, dtype=torch.float64)

    return start


def _lattice_at_rest(realisations: int, size: int, generator: torch.Generator) -> Tensor:
    """Places near a square lattice, and velocities 0."""
    side = math.ceil(math.sqrt(size))
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))[:size].double() - (side - 1) / 2
    jitter = 0.05 * torch.randn(realisations, size, 2, generator=generator, dtype=torch.float64)
    return torch.cat([1.3 * grid + jitter, torch.zeros_like(jitter)], dim=-1)


def _ones(realisations: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.ones(realisations, size, 1, dtype=torch.float64)


def _quantiles(realisations: int, size: int, generator: torch.Generator) -> Tensor:
    """Places spread around 0: equal eigenvalues would start with an infinite force."""
    places = 0.1 * torch.linspace(-1, 1, size, dtype=torch.float64).unsqueeze(-1)
    return places.expand(realisations, -1, -1).clone()


def _semicircle(time: float, x: Tensor) -> Tensor:
    spread = max(-math.expm1(-2 * time), 1e-12)
    return (2 * spread - x.square()).clamp(min=0).sqrt() / (math.pi * spread)


def _inverse_gamma(time: float, x: Tensor) -> Tensor:
    """InvΓ(2, 1), where exchange, volatility and mean are 1; it holds at late times."""
    return x.clamp(min=1e-12).pow(-3) * torch.exp(-1 / x.clamp(min=1e-12))


def _mean_cosine(x: Tensor) -> Tensor:
    """The mean cosine of two tokens where `|x|²` is 1: the observable of attention."""
    return x.mean(dim=1).square().sum(dim=-1)


def _softmax(_: int) -> System:
    return particles.sphere_attention(particles.SoftmaxAttention(beta=2.0))


def _unnormalised(_: int) -> System:
    return particles.sphere_attention(particles.UnnormalisedAttention(beta=2.0))


def _layers(_: int) -> System:
    """One head of random matrices, the same every time."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 16, 16, generator=generator).double().unbind()
    return particles.transformer(particles.SoftmaxAttention(0.25, query / 4, key / 4, value / 4))


def _confined_lennard_jones(size: int) -> System:
    strength = 0.01
    return particles.lennard_jones(
        confinement=lambda x: -strength * x, friction=0.5, temperature=0.4 / (size - 1)
    )  # fmt: skip


CASES: dict[str, Case] = {
    "consensus": Case(lambda _: particles.consensus(), _normal(2), "plane"),
    "wealth": Case(
        lambda _: particles.wealth(), _ones, "line", many=20_000, long=5.0, dt=0.01, law=_inverse_gamma, t1=0.5
    ),
    "opinion": Case(lambda _: particles.opinion(), _uniform(2, 6.0), "plane", lipschitz=False, long=100.0, dt=0.2),
    "cucker_smale": Case(lambda _: particles.cucker_smale(), _normal(4), "arrows", many=300, long=20.0),
    "sphere_unnormalised": Case(
        _unnormalised, _on_sphere(8), "cosines", observable=_mean_cosine, many=256, long=3.0, dt=0.01, batch_size=16
    ),
    "sphere_softmax": Case(
        _softmax, _on_sphere(8), "cosines", observable=_mean_cosine, lipschitz=False, many=256, long=12.0, dt=0.1,
        batch_size=16,
    ),
    "transformer": Case(
        _layers, _normal(16), "cosines", observable=_mean_cosine, lipschitz=False, many=256, long=10.0, dt=0.25,
        batch_size=16,
    ),
    "dyson": Case(
        particles.dyson, _quantiles, "line", many=2000, long=2.0, dt=0.01, law=_semicircle, lipschitz=False,
        why_not="the direct sum is singular and needs steps far below those that pairs of two are solved with",
    ),
    "thomson": Case(
        lambda _: particles.thomson(), _on_sphere(3), "sphere", many=200, long=4.0, dt=0.005, lipschitz=False,
        why_not="the repulsion is singular: at small distances no rate is proved and none settles",
    ),
    "lennard_jones": Case(
        _confined_lennard_jones, _lattice_at_rest, "plane", many=196, long=40.0, dt=0.02, lipschitz=False,
        why_not="the core is singular: random batches of few let particles pass through each other",
    ),
}  # fmt: skip
"""Name → case."""
