"""Particles in time: the direct sum, and random batches without (RBM-1) and with replacement (RBM-r).

Shape letters: R realisations, N particles, S columns of a particle's state, T saved times, p batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch._checks import check_choice, check_integer, check_positive
from randbatch._errors import InvalidValue
from randbatch._optional import require
from randbatch._shapes import Float, Int
from randbatch.particles.interaction import Sets
from randbatch.particles.noise import BrownianPath
from randbatch.particles.system import System
from randbatch.partition import fold_seed, random_partition, random_subsets

__all__ = ["METHODS", "RANDOM_METHODS", "Trajectory", "solve"]

_NOISE = 2**40  # no step has this number: the noise knows nothing of the partitions
_BAR_AFTER = 2.0  # seconds


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States at the saved times.

    Attributes:
        times: float64 `[T]`.
        states: `[T, R, N, S]`, or `[T, N, S]` if the start had no realisations.
    """

    times: Float[Tensor, " t"]
    states: Float[Tensor, "t ... n s"]

    @property
    def final(self) -> Float[Tensor, "... n s"]:
        """The states at the last saved time."""
        return self.states[-1]


@dataclass(frozen=True, eq=False)
class _Run:
    """What the steps of a run have in common; each sees the states as `[R, N, S]`."""

    system: System
    tau: float
    path: BrownianPath
    batch_size: int
    seed: int
    realisation: Int[Tensor, " rn"] | None  # of each of the R N rows; None if there is one

    def noise(self, step: int, x: Tensor, rows: Sequence[int]) -> Tensor | None:
        """The increments of one step, `[*rows, columns]`."""
        columns = self.system.noise_columns(x.shape[-1])
        each = self.path.steps_in(self.tau)
        shape = (*rows, columns)
        return self.path.increment(step * each, (step + 1) * each, shape, x.dtype, x.device) if columns else None

    def marks(self, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Weights and species of R N particles, one realisation after the other."""
        system = self.system
        return tuple(None if mark is None else mark.repeat(rows) for mark in (system.weights, system.species))  # type: ignore[return-value]


def _direct(run: _Run, x: Tensor, step: int) -> Tensor:
    """All N particles are one set."""
    marks = (None if mark is None else mark.unflatten(0, x.shape[:2]) for mark in run.marks(x.shape[0]))
    moved = run.system.together(Sets(x, x.shape[1], *marks), run.tau)
    return run.system.alone(moved, run.tau, run.noise(step, x, x.shape[:2]))


def _rbm1(run: _Run, x: Tensor, step: int) -> Tensor:
    """A fresh partition; in each of its batches the interaction alone, afterwards every particle by itself."""
    rows = x.flatten(0, 1)
    seed = fold_seed(run.seed, step)
    part = random_partition(
        len(rows), run.batch_size, batch=run.realisation, seed=seed, device=x.device, independent=True
    )
    marks = (
        [None] * len(part.groups) if mark is None else part.split(part.pack(mark)) for mark in run.marks(x.shape[0])
    )
    moved = [
        run.system.together(Sets(block, x.shape[1], *own), run.tau)
        for block, *own in zip(part.split(part.pack(rows)), *marks, strict=True)
    ]
    return run.system.alone(part.unpack(part.join(moved)).view_as(x), run.tau, run.noise(step, x, x.shape[:2]))


def _rbmr(run: _Run, x: Tensor, step: int) -> Tensor:
    """N/p random sets one after the other, each of which lives for a step; a particle lives for `tau` on average."""
    realisations, size, _ = x.shape
    draws = -(-size // run.batch_size)
    sets = random_subsets(
        size, run.batch_size, realisations * draws, seed=fold_seed(run.seed, step), device=x.device
    )  # fmt: skip
    sets += size * torch.arange(realisations, device=x.device).repeat_interleave(draws).unsqueeze(1)
    tau = run.tau * size / (draws * run.batch_size)
    noise = run.noise(step, x, sets.shape)
    noise = None if noise is None else noise * math.sqrt(tau / run.tau)
    weights, species = run.marks(realisations)
    rows = x.flatten(0, 1).clone()
    for ready in _independent(sets, len(rows)):
        chosen = sets[ready]
        marks = (None if mark is None else mark[chosen] for mark in (weights, species))
        moved = run.system.together(Sets(rows[chosen], size, *marks), tau)
        rows[chosen] = run.system.alone(moved, tau, None if noise is None else noise[ready])
    return rows.view_as(x)


def _independent(sets: Int[Tensor, "draws p"], num_rows: int) -> Iterator[Int[Tensor, " ready"]]:
    """The draws in groups of disjoint sets that, done group after group, give what one after the other gives.

    A draw is ready when no earlier one that is still to be done has a particle of its own.
    """
    left = torch.arange(len(sets), device=sets.device)
    while left.numel():
        rows = sets[left]
        first = torch.full((num_rows,), len(sets), device=sets.device)
        first.scatter_reduce_(0, rows.flatten(), left.repeat_interleave(rows.shape[1]), "amin")
        ready = (first[rows] == left.unsqueeze(1)).all(dim=1)
        yield left[ready]
        left = left[~ready]


RANDOM_METHODS: dict[str, Callable[[_Run, Tensor, int], Tensor]] = {"rbm1": _rbm1, "rbmr": _rbmr}
"""The methods of random batches. Each makes one step: a run, states `[R, N, S]`, number of the step → next states."""

METHODS = {"direct": _direct} | RANDOM_METHODS
"""All methods."""


@torch.no_grad()
def solve(
    system: System,
    x0: Float[Tensor, "*r n s"],
    t1: float,
    dt: float,
    method: str = "rbm1",
    *,
    batch_size: int | None = None,
    noise: BrownianPath | None = None,
    seed: int = 0,
    save_at: Sequence[float] | None = None,
    progress: bool = False,
) -> Trajectory:
    """Particles from time 0 to `t1` in steps of `dt`, by the direct sum or by random batches.

    - `"direct"`: every particle meets all others, `1/(N−1) Σ_{j≠i}`; O(N²) operations a step, O(N) memory.
    - `"rbm1"`: a fresh random partition each step, `1/(p−1) Σ_{j≠i}` inside each batch; O(N p).
    - `"rbmr"`: in each step N/p times one random set of p particles, drawn anew, in which all, noise and confinement
      too, goes on for `dt`; O(N p). Sets without a common particle are computed at once.

    Realisations are independent: each has its own partitions and its own noise. With the same `noise`, `"direct"` and
    `"rbm1"` are coupled synchronously, at any two steps; the noise of `"rbmr"` belongs to its draws.

    Args:
        system: what moves.
        x0: the start, `[N, S]` or `[R, N, S]` for R realisations. It is not changed.
        t1: > 0, a whole multiple of `dt`.
        dt: τ > 0, the step.
        method: `"direct"`, `"rbm1"` or `"rbmr"`. Default: `"rbm1"`.
        batch_size: p, from 2 to N; required by random batches, and not taken by `"direct"`.
        noise: the Brownian motion. Default: one of this `seed` with steps of `dt`.
        seed: of the partitions. The same seed gives the same trajectory.
        save_at: ascending times from 0 to `t1`, whole multiples of `dt`. Default: `t1` alone.
        progress: whether to show a progress bar on a terminal once the run has taken two seconds; needs tqdm.

    Returns:
        A `Trajectory` on the device of `x0`.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, a number or a time that does not fit, or states that are not finite: the message names
            the step and the particle.

    Source: Jin, Li, Liu, arXiv 1812.10575, algorithms 1 and 2.

    Example:
        >>> from randbatch import particles
        >>> x0 = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> path = solve(particles.consensus(), x0, 4.0, 0.1, batch_size=2, save_at=(0.0, 2.0, 4.0))
        >>> path.states.shape, [round(float(x.std()), 2) for x in path.states]
        (torch.Size([3, 1000, 2]), [1.02, 0.17, 0.04])
    """
    steps = _whole_steps("t1", check_positive("t1", t1), check_positive("dt", dt))
    _check_start(system, x0)
    check_choice("method", method, METHODS)
    size = _check_batch_size(method, batch_size, x0.shape[-2])
    path = BrownianPath(fold_seed(check_integer("seed", seed), _NOISE), dt) if noise is None else noise
    path.steps_in(dt)
    saved = _saved_steps((t1,) if save_at is None else save_at, dt, steps)
    x = x0 if x0.dim() == 3 else x0.unsqueeze(0)
    realisation = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1]) if len(x) > 1 else None
    run = _Run(system, dt, path, size, seed, realisation)
    states = [x0] * (0 in saved)
    numbers = range(steps)
    for step in require("tqdm").tqdm(numbers, unit="step", delay=_BAR_AFTER, disable=None) if progress else numbers:
        x = METHODS[method](run, x, step)
        _check_finite(x, step, dt)
        if step + 1 in saved:
            states.append(x.view_as(x0))
    return Trajectory(torch.tensor(saved, dtype=torch.float64) * dt, torch.stack(states))


def _whole_steps(name: str, time: float, dt: float) -> int:
    steps = round(time / dt)
    if not math.isclose(steps * dt, time, rel_tol=1e-9, abs_tol=1e-9 * dt):
        raise ValueError(f"{name} must be a whole multiple of dt = {dt}, got {time}")
    return steps


def _saved_steps(save_at: Sequence[float], dt: float, steps: int) -> list[int]:
    saved = [_whole_steps("save_at", time, dt) for time in save_at]
    if not saved or saved != sorted(set(saved)) or not 0 <= saved[0] <= saved[-1] <= steps:
        raise ValueError(f"save_at must be ascending times from 0 to t1 = {steps * dt:g}, got {list(save_at)}")
    return saved


def _check_batch_size(method: str, batch_size: int | None, num_particles: int) -> int:
    if method not in RANDOM_METHODS:
        if batch_size is not None:
            raise ValueError(f"batch_size must be None with method {method!r}, which has no batches; got {batch_size}")
        return num_particles
    if batch_size is None:
        raise TypeError(f"batch_size must be given with method {method!r}")
    if check_integer("batch_size", batch_size, 2) > num_particles:
        raise ValueError(f"batch_size must be at most the number of particles {num_particles}, got {batch_size}")
    return batch_size


def _check_start(system: System, x0: Tensor) -> None:
    if x0.dim() not in (2, 3) or x0.shape[-2] < 2 or 0 in x0.shape:
        raise ValueError(f"x0 must have shape [N, S] or [R, N, S] with N >= 2, got {list(x0.shape)}")
    if not x0.is_floating_point():
        raise TypeError(f"x0 must be a floating-point tensor, got {x0.dtype}")
    if system.even_columns and x0.shape[-1] % 2:
        raise ValueError(f"x0 must have positions and velocities, an even number of columns, got {x0.shape[-1]}")
    for name, mark in (("weights", system.weights), ("species", system.species)):
        if mark is not None and (mark.shape != x0.shape[-2:-1] or mark.device != x0.device):
            raise ValueError(
                f"{name} must have shape [{x0.shape[-2]}] on {x0.device} to fit x0, "
                f"got {list(mark.shape)} on {mark.device}"
            )
    _check_finite(x0 if x0.dim() == 3 else x0.unsqueeze(0), -1, 0.0)


def _check_finite(x: Float[Tensor, "r n s"], step: int, dt: float) -> None:
    """One sum in the good case; it may overflow, so only the second look condemns."""
    if math.isfinite(float(x.sum())):
        return
    bad = (~x.isfinite()).any(dim=-1).nonzero()
    if not len(bad):
        return
    realisation, particle = bad[0].tolist()
    where = f"particle {particle}" + (f" of realisation {realisation}" if len(x) > 1 else "")
    row = x[realisation, particle].tolist()
    if step < 0:
        raise InvalidValue(f"x0 must be finite, got {row} for {where}")
    times = f"t = {step * dt:g} to {(step + 1) * dt:g}"
    raise InvalidValue(
        f"the states must stay finite, got {row} for {where} in step {step} ({times}); is dt too large for the force?"
    )
