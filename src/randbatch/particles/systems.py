"""Systems with a known answer, each made by one call; what the answer is stands with each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from randbatch._checks import check_integer, check_positive
from randbatch.particles.attention import SoftmaxAttention, UnnormalisedAttention
from randbatch.particles.pair_forces import Alignment, LinearForce, PowerRepulsion, RadialForce
from randbatch.particles.system import LAYER_NORM, SPHERE, Langevin, MultiplicativeNoise, System

__all__ = [
    "consensus", "cucker_smale", "dyson", "lennard_jones", "opinion", "sphere_attention", "thomson", "transformer",
    "wealth",
]  # fmt: skip


def consensus(strength: float = 1.0) -> System:
    """Linear consensus, `dx_i = −κ/(N−1) Σ_{j≠i} (x_i − x_j) dt`, solved exactly inside every set.

    Directly, distances to the mean shrink by `exp(−κ N t/(N−1))`. For RBM-1 the second moments are known.

    Args:
        strength: κ > 0. Default: 1, the time unit.

    Raises:
        ValueError: κ is not a finite number > 0.

    Example:
        >>> from randbatch.particles import solve
        >>> solve(consensus(), torch.tensor([[0.0], [1.0]]), 1.0, 0.5, "direct").final.flatten()
        tensor([0.4323, 0.5677])
    """
    return System(LinearForce(strength))


def dyson(num_particles: int) -> System:
    """Dyson Brownian motion, `dλ_j = −λ_j dt + 1/(N−1) Σ_{k≠j} dt/(λ_j − λ_k) + dB_j/√(N−1)`, states `[R, N, 1]`.

    With `batch_size=2` the repulsion is solved exactly, and the step need not resolve the smallest gap; the direct sum
    must. From 0 the density at time t is a semicircle of radius `√(2 s)`, s = 1 − e^(−2t), as N grows.

    Args:
        num_particles: N >= 2, which sets the noise.

    Raises:
        TypeError: N is not an int.
        ValueError: N < 2.

    Source: Jin, Li, Liu, arXiv 1812.10575 (its first example).

    Example:
        >>> from randbatch.particles import solve
        >>> eigenvalues = solve(dyson(500), torch.zeros(500, 1), 4.0, 0.01, batch_size=2).final
        >>> abs(float(eigenvalues.square().mean()) - 0.5) < 0.05  # a semicircle of radius √2
        True
    """
    check_integer("num_particles", num_particles, 2)
    return System(PowerRepulsion(2.0), confinement=torch.neg, diffusion=1 / math.sqrt(num_particles - 1))


def wealth(exchange: float = 1.0, volatility: float = 1.0) -> System:
    """Wealth that is traded and grows at random, `dX_i = −κ/(N−1) Σ_{j≠i} (X_i − X_j) dt + √(2D) X_i dB_i`.

    Both parts are solved exactly, so wealth stays positive. In the long run it is distributed as the inverse gamma law
    `InvΓ(1 + κ/D, κη/D)` of mean η, with a tail of index 1 + κ/D, as N grows.

    Args:
        exchange: κ > 0. Default: 1.
        volatility: D > 0. Default: 1, a tail of index 2, Pareto's.

    Raises:
        ValueError: κ or D is not a finite number > 0.

    Source: Jin, Li, Liu, arXiv 1812.10575 (distribution of wealth); Bouchaud, Mézard, Physica A 282 (2000).

    Example:
        >>> from randbatch.particles import solve
        >>> bool((solve(wealth(), torch.ones(1000, 1), 1.0, 0.1, batch_size=2).final > 0).all())
        True
    """
    check_positive("volatility", volatility)
    return MultiplicativeNoise(LinearForce(check_positive("exchange", exchange)), diffusion=math.sqrt(2 * volatility))


def thomson() -> System:
    """Charges on the unit sphere that repel each other, `dx_i = P_{x_i} 1/(N−1) Σ_{j≠i} (x_i − x_j)/|x_i − x_j|³ dt`.

    The flow goes downhill to a (local) minimum of `Σ_{i<j} 1/|x_i − x_j|`: 49.165253058 for N = 12, an icosahedron.
    With `batch_size=2` the repulsion is solved exactly in space and brought back to the sphere.

    Example:
        >>> from randbatch.particles import energy, solve
        >>> x0 = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> x0 = torch.nn.functional.normalize(x0, dim=-1)
        >>> tetrahedron = solve(thomson(), x0, 50.0, 0.1, "direct").final
        >>> round(float(energy(tetrahedron, lambda squared: squared.rsqrt())), 6)
        3.674235
    """
    return System(PowerRepulsion(3.0), manifold=SPHERE)


def opinion(radius: float = 1.0, strength: float = 1.0) -> System:
    """Bounded confidence, `dx_i = κ/(N−1) Σ_{j≠i} 1[|x_i − x_j| < r] (x_j − x_i) dt`, in any number of dimensions.

    Opinions gather in clusters that are more than r apart; the mean opinion stays.

    Args:
        radius: r > 0, whom one listens to. Default: 1, the unit of opinion.
        strength: κ > 0. Default: 1.

    Raises:
        ValueError: r or κ is not a finite number > 0.

    Source: Jin, Li, Liu, arXiv 1812.10575 (opinion dynamics); Motsch, Tadmor, SIAM Review 56 (2014).

    Example:
        >>> from randbatch.particles import cluster_count, solve
        >>> x0 = torch.tensor([[0.0], [0.5], [3.0], [3.5]])
        >>> int(cluster_count(solve(opinion(), x0, 20.0, 0.1, "direct").final, radius=0.1))
        2
    """
    limit = check_positive("radius", radius) ** 2
    check_positive("strength", strength)
    return System(RadialForce(lambda squared: (squared < limit).to(squared) * -strength))


def cucker_smale(exponent: float = 0.25, strength: float = 1.0) -> System:
    """Flocking, `dx_i = v_i dt`, `dv_i = κ/(N−1) Σ_{j≠i} (v_j − v_i)/(1 + |x_i − x_j|²)^β dt`; states `(x_i, v_i)`.

    The mean velocity stays. For β <= 1/2 all velocities become equal exponentially fast from any start. Random batches
    keep both.

    Args:
        exponent: β >= 0. Default: 1/4, a flock from any start.
        strength: κ > 0. Default: 1.

    Raises:
        ValueError: β is negative, or κ is not a finite number > 0.

    Source: Cucker, Smale, IEEE TAC 52 (2007); with random batches Jin, Wang, Wang, arXiv 2501.15152.

    Example:
        >>> from randbatch.particles import solve
        >>> start = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> flock = solve(cucker_smale(), start, 20.0, 0.1, batch_size=2).final
        >>> bool(flock[:, 2:].std(dim=0).max() < 0.01)
        True
    """
    check_positive("strength", strength)
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent must be a finite number >= 0, got {exponent}")

    def glide(states: Tensor) -> Tensor:
        velocities = states.chunk(2, dim=-1)[1]
        return torch.cat([velocities, torch.zeros_like(velocities)], dim=-1)

    return System(Alignment(lambda squared: strength * (1 + squared).pow(-exponent)), confinement=glide)


def lennard_jones(
    cutoff: float = 2.5,
    *,
    confinement: Callable[[Tensor], Tensor] | None = None,
    friction: float = 0.0,
    temperature: float = 0.0,
) -> Langevin:
    """Lennard-Jones particles of size and depth 1, potential `4 (r⁻¹² − r⁻⁶)/(N−1)` for r < `cutoff`, states `(x, v)`.

    The core is singular: random batches with Euler's kicks need small steps and friction, and at high density the
    direct sum is the safer choice. The force is cut, not shifted.

    Args:
        cutoff: > 0, beyond which particles do not meet. Default: 2.5.
        confinement: −∇V, from positions to forces. Default: none.
        friction: γ >= 0. Default: 0, energy is kept.
        temperature: T >= 0. Default: 0.

    Raises:
        ValueError: a number that is out of range.

    Example:
        >>> from randbatch.particles import solve
        >>> pair = torch.tensor([[0.0, 0.0], [1.3, 0.0]], dtype=torch.float64)  # on a line, at rest
        >>> settled = solve(lennard_jones(friction=1.0), pair, 60.0, 0.01, "direct").final
        >>> round(float((settled[1] - settled[0])[0]), 4)  # 2^(1/6)
        1.1225
    """
    limit = check_positive("cutoff", cutoff) ** 2

    def push(squared: Tensor) -> Tensor:
        inverse = squared.reciprocal()
        cube = inverse**3
        return torch.where(squared < limit, 24 * inverse * cube * (2 * cube - 1), 0.0)

    force = RadialForce(push, singular=True)
    return Langevin(force, confinement, friction=friction, temperature=temperature)


def sphere_attention(attention: SoftmaxAttention | UnnormalisedAttention) -> System:
    """Tokens on the unit sphere that attend to each other, `dx_i = P_{x_i} F_i(x) dt`, `P_x = I − x xᵀ`.

    From orthogonal starts and with Q = K = V = I all cosines stay equal and solve one scalar equation; for β > 0 the
    energy `1/(2βN²) Σ_ij exp(β ⟨x_i, x_j⟩)` grows along both flows, and tokens gather in clusters.

    Args:
        attention: `SoftmaxAttention` (SA) or `UnnormalisedAttention` (USA), with its β, Q, K and V.

    Source: Geshkovski, Letrouit, Polyanskiy, Rigollet, arXiv 2312.10794, equations SA and USA, theorem 6.8.

    Example:
        >>> from randbatch.particles import solve
        >>> tokens = solve(sphere_attention(SoftmaxAttention(beta=1.0)), torch.eye(8), 10.0, 0.1, batch_size=4).final
        >>> bool((tokens @ tokens.T).min() > 0.99)
        True
    """
    return System(attention, manifold=SPHERE)


def transformer(attention: SoftmaxAttention, feed_forward: Callable[[Tensor], Tensor] | None = None) -> System:
    """Tokens in ℝᴰ that attend to each other, with layer norm: `dx_i = F_i(x) dt + f(x_i) dt` between two norms.

    A step is the Lie–Trotter splitting `x ← LN(x + τ F(x))`, `x ← LN(x + τ f(x))`. With τ = 1 it is a post-norm
    transformer layer whose norms have no weights.

    Args:
        attention: β, Q, K, V; see `SoftmaxAttention`.
        feed_forward: f, from states to changes. Default: none, attention and layer norm alone.

    Source: Lu et al., "Understanding and improving transformer from a multi-particle dynamic system point of view",
    arXiv 1906.02762.

    Example:
        >>> from randbatch.particles import solve
        >>> layers = transformer(SoftmaxAttention(beta=0.25), torch.nn.Linear(16, 16))
        >>> solve(layers, torch.randn(64, 16), 6.0, 1.0, batch_size=8).final.shape  # six layers
        torch.Size([64, 16])
    """
    return System(attention, feed_forward, manifold=LAYER_NORM)
