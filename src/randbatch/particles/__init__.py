"""Interacting particles by random batches (the Random Batch Method), on the partitions that attention uses.

>>> import torch
>>> from randbatch import particles
>>> x0 = torch.randn(1000, 2)
>>> particles.solve(particles.opinion(), x0, t1=1.0, dt=0.1, batch_size=2).final.shape
torch.Size([1000, 2])
"""

from randbatch.particles.attention import SoftmaxAttention, UnnormalisedAttention
from randbatch.particles.convergence import measure_convergence
from randbatch.particles.interaction import Interaction, Sets
from randbatch.particles.metrics import (
    WeakError,
    attention_energy,
    cluster_count,
    cosine_histogram,
    energy,
    fit_rate,
    mmd,
    sliced_w2,
    strong_error,
    w2,
    weak_error,
)
from randbatch.particles.noise import BrownianPath
from randbatch.particles.pair_forces import Alignment, LinearForce, PowerRepulsion, RadialForce
from randbatch.particles.rates import Convergence, Errors, Point, Rate
from randbatch.particles.solver import Trajectory, solve
from randbatch.particles.system import LAYER_NORM, SPHERE, Langevin, Manifold, MultiplicativeNoise, System
from randbatch.particles.systems import (
    consensus,
    cucker_smale,
    dyson,
    lennard_jones,
    opinion,
    sphere_attention,
    thomson,
    transformer,
    wealth,
)

__all__ = [
    "LAYER_NORM",
    "SPHERE",
    "Alignment",
    "BrownianPath",
    "Convergence",
    "Errors",
    "Interaction",
    "Langevin",
    "LinearForce",
    "Manifold",
    "MultiplicativeNoise",
    "Point",
    "PowerRepulsion",
    "RadialForce",
    "Rate",
    "Sets",
    "SoftmaxAttention",
    "System",
    "Trajectory",
    "UnnormalisedAttention",
    "WeakError",
    "attention_energy",
    "cluster_count",
    "consensus",
    "cosine_histogram",
    "cucker_smale",
    "dyson",
    "energy",
    "fit_rate",
    "lennard_jones",
    "measure_convergence",
    "mmd",
    "opinion",
    "sliced_w2",
    "solve",
    "sphere_attention",
    "strong_error",
    "thomson",
    "transformer",
    "w2",
    "weak_error",
    "wealth",
]
