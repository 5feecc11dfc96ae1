"""Brownian paths that several runs share, also with different steps: the ground of synchronous coupling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch._checks import check_integer, check_positive
from randbatch.partition import fold_seed

__all__ = ["BrownianPath"]


@dataclass(frozen=True)
class BrownianPath:
    """Increments of Brownian motion on the grid 0, dt, 2 dt, …; a longer step adds up those of the grid.

    Two runs with the same path, direct and by random batches, or with steps of `dt` and of `4 * dt`, feel the same
    noise. The numbers depend on the kind of device and on the dtype, as torch's do, and on nothing else but the seed.

    Args:
        seed: any int.
        dt: > 0, the step of the grid: the smallest step of the runs that share the path.

    Raises:
        TypeError: `seed` is not an int, or `dt` not a number.
        ValueError: `dt` is not > 0.

    Example:
        >>> path = BrownianPath(seed=0, dt=0.25)
        >>> whole = path.increment(0, 4, (3,))
        >>> torch.allclose(whole, path.increment(0, 2, (3,)) + path.increment(2, 4, (3,)), atol=1e-6)
        True
    """

    seed: int
    dt: float

    def __post_init__(self) -> None:
        check_integer("seed", self.seed)
        check_positive("dt", self.dt)

    def increment(
        self,
        start: int,
        stop: int,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """`B(stop · dt) − B(start · dt)`, independent normal numbers of variance `(stop − start) dt` in `shape`."""
        total = torch.zeros(tuple(shape), dtype=dtype, device=device)
        for step in range(start, stop):
            generator = torch.Generator(device).manual_seed(fold_seed(self.seed, step))
            total += torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)
        return total.mul_(math.sqrt(self.dt))

    def steps_in(self, dt: float) -> int:
        """How many steps of the grid are one step of `dt`; a `ValueError` where they do not make a whole number."""
        ratio = round(dt / self.dt)
        if ratio < 1 or not math.isclose(ratio * self.dt, dt, rel_tol=1e-9):
            raise ValueError(f"dt must be a whole multiple of the noise's step {self.dt}, got {dt}")
        return ratio
