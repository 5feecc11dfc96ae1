"""Errors of random batch methods at several steps, against the direct sum.

Shape letters: R realisations, N particles, S columns of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch._checks import check_choice, check_integer, check_positive
from randbatch._shapes import Float
from randbatch.particles.noise import BrownianPath
from randbatch.particles.rates import FEWEST, Convergence, Errors
from randbatch.particles.solver import RANDOM_METHODS, solve
from randbatch.particles.system import System
from randbatch.partition import fold_seed

__all__ = ["Job", "jobs_of", "measure", "measure_convergence", "second_moment"]


@dataclass(frozen=True, eq=False)
class Job:
    """Runs at several steps that are to be compared with one reference.

    Attributes:
        label: what is measured: a method, an estimator.
        batch_size: p.
        final: from the number of a run and a step τ to the states `[R, N, S]` at the end.
        coupled: whether reference and runs share their noise, so that the strong error means something.
        proved_strong: the rate of the theorem for the strong error. None: nothing is proved.
        proved_weak: for the weak error.
    """

    label: str
    batch_size: int
    final: Callable[[int, float], Tensor]
    coupled: bool = True
    proved_strong: float | None = None
    proved_weak: float | None = None


def measure(
    job: Job,
    reference: Float[Tensor, "r n s"],
    dts: Sequence[float],
    observable: Callable[[Tensor], Tensor],
    tick: Callable[[], object] = lambda: None,
) -> Errors:
    """Run a job at every step and compare with the reference; `tick` is called after each run.

    Raises:
        ValueError: fewer than two realisations, fewer than three steps, or an observable that is not `[R]`.
    """
    steps = sorted({check_positive("dts", dt) for dt in dts}, reverse=True)
    if len(steps) < FEWEST:
        raise ValueError(f"dts must be at least {FEWEST} different steps, got {list(dts)}")
    if reference.dim() != 3 or len(reference) < 2:
        raise ValueError(f"reference must have shape [R, N, S] with R >= 2, got {list(reference.shape)}")
    truth = observable(reference).double()
    if truth.shape != (len(reference),):
        raise ValueError(f"observable must give one number for each of {len(reference)} realisations")
    squared: list[Tensor] = []
    difference: list[Tensor] = []
    for number, dt in enumerate(steps):
        states = job.final(number, dt)
        difference.append((observable(states).double() - truth).cpu())
        squared.append((states - reference).double().square().sum(dim=-1).mean(dim=-1).cpu())
        tick()
    strong, proved = (torch.stack(squared), job.proved_strong) if job.coupled else (None, None)
    return Errors(job.label, job.batch_size, steps, strong, torch.stack(difference), proved, job.proved_weak)


def second_moment(x: Float[Tensor, "r n s"]) -> Float[Tensor, " r"]:
    """`1/N Σ_i |x_i|²` of every realisation."""
    return x.square().sum(dim=-1).mean(dim=-1)


def jobs_of(
    system: System,
    x0: Float[Tensor, "r n s"],
    t1: float,
    methods: Sequence[str],
    batch_sizes: Sequence[int],
    noise: BrownianPath,
    *,
    proved: bool = True,
    seed: int = 0,
) -> list[Job]:
    """A job for every random batch method and batch size, all with the noise of `noise`.

    Args:
        system: what moves.
        x0: the start, `[R, N, S]`.
        t1: the end.
        methods: of `"rbm1"` and `"rbmr"`.
        batch_sizes: p >= 2 each.
        noise: the Brownian path of all runs.
        proved: whether the theorems hold for this system: an unbiased interaction whose pair force is bounded and
            Lipschitz. RBM-1 then has strong rate ½ and weak rate 1, RBM-r ½ in W₂ without noise.
        seed: of the partitions; every run has its own.
    """
    coupled = {"rbm1": True, "rbmr": system.noise_columns(x0.shape[-1]) == 0}  # the noise of RBM-r is of its draws

    def job(method: str, size: int, number: int) -> Job:
        def final(run: int, dt: float) -> Tensor:
            own = fold_seed(fold_seed(seed, number), run)
            return solve(system, x0, t1, dt, method, batch_size=size, noise=noise, seed=own).final

        return Job(
            method, size, final, coupled[method], 0.5 if proved else None, 1.0 if proved and method == "rbm1" else None
        )

    for method in methods:
        check_choice("methods", method, RANDOM_METHODS)
    pairs = [(method, check_integer("batch_sizes", size, 2)) for method in methods for size in batch_sizes]
    return [job(method, size, number) for number, (method, size) in enumerate(pairs)]


def measure_convergence(
    system: System,
    x0: Float[Tensor, "r n s"],
    t1: float,
    dts: Sequence[float],
    *,
    methods: Sequence[str] = ("rbm1",),
    batch_sizes: Sequence[int] = (2,),
    observable: Callable[[Tensor], Tensor] = second_moment,
    refine: int = 4,
    proved: bool = True,
    seed: int = 0,
) -> Convergence:
    """Strong and weak errors of random batch methods at `t1` for several steps, and the slopes through them.

    The reference is the direct sum with a step `refine` times smaller than the smallest, from the same start and with
    the same noise (synchronous coupling): the errors hold what random batches and the finite step do together.

    Args:
        system: what moves.
        x0: the start, `[R, N, S]`, R >= 2 realisations.
        t1: > 0, a whole multiple of every step.
        dts: τ, at least three, whole multiples of the smallest.
        methods: of `"rbm1"` and `"rbmr"`; the latter has no strong error where there is noise.
        batch_sizes: p >= 2 each.
        observable: φ of the weak error, from states `[R, N, S]` to `[R]`. Default: the second moment.
        refine: how much finer the reference is. Default: 4.
        proved: whether the theorems hold for this system, for the column "proved".
        seed: of the noise and the partitions.

    Returns:
        A `Convergence`.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number or a shape that does not fit.

    Source: Jin, Li, Liu, arXiv 1812.10575 (strong error of order ½).

    Example:
        >>> from randbatch import particles
        >>> x0 = torch.randn(200, 16, 1, generator=torch.Generator().manual_seed(0))
        >>> found = measure_convergence(particles.consensus(), x0, 1.0, (0.25, 0.125, 0.0625))
        >>> 0.3 < found.errors[0].strong_rate().value < 0.7
        True
    """
    if x0.dim() != 3:
        raise ValueError(f"x0 must have shape [R, N, S], got {list(x0.shape)}")
    smallest = min(check_positive("dts", dt) for dt in dts)
    noise = BrownianPath(fold_seed(seed, 0), smallest / check_integer("refine", refine, 1))
    jobs = jobs_of(system, x0, t1, methods, batch_sizes, noise, proved=proved, seed=fold_seed(seed, 1))
    reference = solve(system, x0, t1, noise.dt, "direct", noise=noise).final
    errors = [measure(job, reference, dts, observable) for job in jobs]
    return Convergence(type(system.interaction).__name__, x0.shape[1], errors)
