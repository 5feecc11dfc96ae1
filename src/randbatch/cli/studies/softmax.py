"""Softmax against the theory: self-attention on the sphere by each estimator, as the step goes to 0.

Shape letters: R realisations, N tokens, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from randbatch._shapes import Float
from randbatch.estimators import ESTIMATORS
from randbatch.functional import random_batch_attention
from randbatch.particles import SPHERE, BrownianPath, SoftmaxAttention, System, UnnormalisedAttention, solve
from randbatch.particles.convergence import Job, jobs_of
from randbatch.particles.interaction import Sets
from randbatch.partition import fold_seed

__all__ = ["AttentionInBatches", "softmax_jobs"]

BETA = 2.0
ROUNDS = (2, 4)


@dataclass(frozen=True, eq=False)
class AttentionInBatches(System):
    """The sphere dynamics SA, `dx_i = P_{x_i} F_i(x) dt`, with `rb.random_batch_attention` as F: Q = K = V = I.

    Solve it by `"direct"`: the random batches are inside F, drawn in every step from torch's default generator.

    Args:
        batch_size: p.
        estimator: of the op.
        rounds: of the op.
    """

    batch_size: int = 8
    estimator: str = "plain"
    rounds: int = 1

    def together(self, sets: Sets, tau: float) -> Float[Tensor, "b n d"]:
        """The states after a step of attention."""
        tokens = sets.x.flatten(0, 1).unsqueeze(1)  # [R N, 1, D]
        realisation = torch.arange(len(sets.x), device=tokens.device).repeat_interleave(sets.x.shape[1])
        force = random_batch_attention(
            tokens, tokens, tokens, batch_size=self.batch_size, batch=realisation, estimator=self.estimator,
            rounds=self.rounds, scale=BETA,
        )  # fmt: skip
        return SPHERE.retract(sets.x + tau * SPHERE.tangent(sets.x, force.view_as(sets.x)))


def softmax_jobs(
    x0: Float[Tensor, "r n d"], t1: float, batch_sizes: Sequence[int], noise: BrownianPath, seed: int
) -> list[tuple[System, list[Job]]]:
    """Softmax attention by every estimator and by rounds, and the unnormalised attention, which follows the lemma.

    Each list of jobs comes with the system whose direct sum is its reference. The last softmax job of each batch size
    takes all rounds: its error is that of the step alone.
    """
    softmax = System(SoftmaxAttention(BETA), manifold=SPHERE)
    unnormalised = System(UnnormalisedAttention(BETA), manifold=SPHERE)
    jobs: list[Job] = []
    for size in batch_sizes:
        every = -(-(x0.shape[1] - 1) // (size - 1))
        kinds = [(name, 1) for name in ESTIMATORS]
        kinds += [("plain", rounds) for rounds in (*(few for few in ROUNDS if few < every), every) if rounds > 1]
        for name, rounds in kinds:
            system = AttentionInBatches(
                softmax.interaction, manifold=SPHERE, batch_size=size, estimator=name, rounds=rounds
            )
            jobs.append(_job(system, x0, t1, fold_seed(seed, len(jobs)), rounds == every))
    lemma = jobs_of(unnormalised, x0, t1, ("rbm1",), batch_sizes, noise, seed=seed)
    return [(softmax, jobs), (unnormalised, [replace(job, label="unnormalised") for job in lemma])]


def _job(system: AttentionInBatches, x0: Tensor, t1: float, seed: int, is_all: bool) -> Job:
    def final(run: int, dt: float) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # the op draws its partitions from torch's generator
            torch.manual_seed(fold_seed(seed, run) % 2**63)
            return solve(system, x0, t1, dt, "direct").final

    rounds = "" if system.rounds == 1 else f", {'all ' if is_all else ''}{system.rounds} rounds"
    return Job(f"{system.estimator}{rounds}", system.batch_size, final)
