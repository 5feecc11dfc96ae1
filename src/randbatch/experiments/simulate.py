"""`randbatch simulate`: a trajectory, and what it looks like."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randbatch._checks import check_choice, check_integer
from randbatch._files import write_bytes
from randbatch._optional import require
from randbatch.experiments.cases import CASES, start_of
from randbatch.experiments.folders import open_folder
from randbatch.experiments.frames import draw_strip, film
from randbatch.particles import Trajectory, solve
from randbatch.particles.solver import METHODS

__all__ = ["SimulateConfig", "simulate"]


@dataclass(frozen=True)
class SimulateConfig:
    """A system of particles in time: its trajectory (NPZ), a strip of frames (PNG), and a film (GIF)."""

    system: str = "opinion"
    """consensus, wealth, opinion, cucker_smale, sphere_unnormalised, sphere_softmax, transformer, dyson, thomson or
    lennard_jones."""
    method: str = "rbm1"
    """direct, rbm1 or rbmr."""
    batch_size: int | None = None
    """p, for random batches. Default: 16 for attention, otherwise 2."""
    num_particles: int | None = None
    """N. Default: the one of the system."""
    t1: float | None = None
    """The end. Default: the one of the system."""
    dt: float | None = None
    """The step. Default: the one of the system."""
    frames: int = 6
    """Saved times, and panels of the strip."""
    film: bool = False
    """Whether to make a film as well, of as many frames as are saved: take --frames 60."""
    seed: int = 0
    """Of start, noise and partitions."""
    out: Path | None = None
    """Folder of the results. Default: runs/simulate-<system>-<time>."""


def simulate(config: SimulateConfig, *, say: Callable[[str], None] = print) -> Trajectory:
    """Solve, and write trajectory and pictures.

    Raises:
        ValueError: a setting that does not fit.
        Interrupted: by Ctrl-C.
    """
    case = CASES[check_choice("system", config.system, CASES)]
    check_choice("method", config.method, METHODS)
    size = case.many if config.num_particles is None else config.num_particles
    dt = case.dt if config.dt is None else config.dt
    t1 = case.long if config.t1 is None else config.t1
    steps = round(t1 / dt)
    if check_integer("frames", config.frames, 2) > steps + 1:
        raise ValueError(f"frames must be at most the number of steps and the start, {steps + 1}, got {config.frames}")
    saved = [dt * round(steps * number / (config.frames - 1)) for number in range(config.frames)]
    x0 = start_of(case, 1, check_integer("num_particles", size, 2), config.seed)[0]
    batch_size = config.batch_size if config.batch_size or config.method == "direct" else case.batch_size
    settings = {"system": config.system, "method": config.method, "batch_size": batch_size, "num_particles": size}
    settings |= {"t1": t1, "dt": dt, "frames": config.frames, "seed": config.seed}
    with open_folder(config.out, f"simulate-{config.system}", settings, say, " (it starts from t = 0)") as folder:
        found = solve(
            case.system(size), x0, t1, dt, config.method, batch_size=batch_size, seed=config.seed, save_at=saved,
            progress=True,
        )  # fmt: skip
        write_bytes(folder / "trajectory.npz", _npz(found))
        title = f"{config.system}, N = {size}, {config.method}" + ("" if batch_size is None else f", p = {batch_size}")
        draw_strip(found, case, title, folder / "frames.png")
        say(f"\ntrajectory: {folder / 'trajectory.npz'}\nframes: {folder / 'frames.png'}")
        if config.film:
            film(found, case, title, folder / "film.gif")
            say(f"film: {folder / 'film.gif'}")
    return found


def _npz(found: Trajectory) -> bytes:
    """`times` `[T]` and `states` `[T, N, S]`, as numpy reads them."""
    numpy: Any = require("numpy")
    content = io.BytesIO()
    numpy.savez_compressed(content, times=found.times.numpy(), states=found.states.cpu().numpy())
    return content.getvalue()
