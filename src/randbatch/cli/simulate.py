"""`randbatch simulate`: a trajectory and its pictures."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from randbatch._checks import (
    MOST,
    check_choice,
    check_integer,
    check_multiple,
    check_positive,
    check_seed,
)
from randbatch._errors import InvalidValue
from randbatch._files import write_bytes
from randbatch._folders import new_place, open_folder
from randbatch._memory import check_memory
from randbatch._optional import require
from randbatch.cli.command import PICTURES, Command
from randbatch.cli.studies.cases import CASES, start_of
from randbatch.cli.studies.frames import draw_strip, film
from randbatch.particles import Trajectory, solve
from randbatch.particles.solver import METHODS, RANDOM_METHODS

__all__ = ["COMMAND", "SimulateConfig", "simulate"]


@dataclass(frozen=True)
class SimulateConfig:
    """A system of particles in time: its trajectory (NPZ), a strip of frames (PNG), and a film (GIF)."""

    system: str = "opinion"
    """consensus, wealth, opinion, cucker_smale, sphere_unnormalised, sphere_softmax, transformer, dyson, thomson,
    lennard_jones."""
    method: str = "rbm1"
    """direct, rbm1 or rbmr."""
    batch_size: int | None = None
    """Batch size p of rbm1 and rbmr. Default: 16 for attention, otherwise 2."""
    num_particles: int | None = None
    """Number of particles N. Default: that of the system."""
    t1: float | None = None
    """Time of the end. Default: that of the system."""
    dt: float | None = None
    """Step τ. Default: that of the system."""
    frames: int = 6
    """Number of saved times. The strip shows at most 60 of them."""
    film: bool = False
    """Whether to make a film of the saved times, too; --frames 60 gives five seconds."""
    seed: int = 0
    """Seed of start, noise and partitions."""
    out: Path | None = None
    """Folder of the results. Default: runs/simulate-<system>-<time>."""

    def __post_init__(self) -> None:
        """Check the settings together with the defaults of the system."""
        _Plan.of(self)


@dataclass(frozen=True)
class _Plan:
    """The settings with every default filled in."""

    system: str
    method: str
    batch_size: int | None
    num_particles: int
    t1: float
    dt: float
    frames: int
    seed: int

    @classmethod
    def of(cls, config: SimulateConfig) -> _Plan:
        case = CASES[check_choice("system", config.system, CASES)]
        check_choice("method", config.method, METHODS)
        size = case.many if config.num_particles is None else config.num_particles
        check_integer("num_particles", size, 2, MOST)
        batch_size = config.batch_size
        if config.method in RANDOM_METHODS:
            batch_size = case.batch_size if batch_size is None else batch_size
            if check_integer("batch_size", batch_size, 2) > size:
                raise InvalidValue(f"batch_size must be at most the number of particles {size}, got {batch_size}")
        elif batch_size is not None:
            raise InvalidValue(f"batch_size must be left out with method {config.method!r}, got {batch_size}")
        dt = check_positive("dt", case.dt if config.dt is None else config.dt)
        t1 = check_positive("t1", case.long if config.t1 is None else config.t1)
        steps = check_multiple("t1", t1, "dt", dt)
        if check_integer("frames", config.frames, 2) > steps + 1:
            raise InvalidValue(
                f"frames must be at most the number of steps and the start, {steps + 1}, got {config.frames}"
            )
        seed = check_seed("seed", config.seed)
        return cls(config.system, config.method, batch_size, size, t1, dt, config.frames, seed)

    def saved(self) -> list[float]:
        """The times of the frames."""
        steps = round(self.t1 / self.dt)
        return [self.dt * round(steps * number / (self.frames - 1)) for number in range(self.frames)]


def simulate(config: SimulateConfig, *, say: Callable[[str], None] = print) -> Trajectory:
    """Solve, and write trajectory and pictures.

    Raises:
        UserError: a setting that does not fit, a missing package, a folder with other results.
        Interrupted: by Ctrl-C.
    """
    plan, case = _Plan.of(config), CASES[config.system]
    if config.film:
        require("PIL")  # what is missing shows before a folder is made
    row = start_of(case, 1, 2, plan.seed)[0, 0]  # of one particle
    least = plan.num_particles * row.numel() * row.element_size()
    check_memory("num_particles", plan.num_particles, (2 + plan.frames) * least)
    x0 = start_of(case, 1, plan.num_particles, plan.seed)[0]
    folder = config.out or new_place(f"simulate-{config.system}")
    how = f"the same command and --out {shlex.quote(str(folder))} (it starts from t = 0)"
    with open_folder(folder, asdict(plan), say=say, how=how):
        found = solve(
            case.system(plan.num_particles), x0, plan.t1, plan.dt, plan.method, batch_size=plan.batch_size,
            seed=plan.seed, save_at=plan.saved(), progress=True,
        )  # fmt: skip
        write_bytes(folder / "trajectory.npz", _npz(found))
        title = f"{plan.system}, N = {plan.num_particles}, {plan.method}"
        title += "" if plan.batch_size is None else f", p = {plan.batch_size}"
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


COMMAND = Command("simulate", "a system of particles in time", SimulateConfig, simulate, needs=PICTURES)
