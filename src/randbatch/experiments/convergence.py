"""`randbatch convergence`: measured rates against proved ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randbatch._checks import (
    MOST,
    check_choice,
    check_integer,
    check_multiple,
    check_positive,
    check_seed,
    check_several,
)
from randbatch._errors import InvalidValue
from randbatch._files import read_record, write_record, write_text
from randbatch._memory import check_memory
from randbatch._optional import require
from randbatch.experiments.cases import CASES, Case, start_of
from randbatch.experiments.folders import open_folder
from randbatch.experiments.report import draw_convergence, points_csv
from randbatch.experiments.softmax import softmax_jobs
from randbatch.particles import BrownianPath, System, solve
from randbatch.particles.convergence import jobs_of, measure, second_moment
from randbatch.particles.rates import FEWEST, Convergence, Errors
from randbatch.particles.solver import METHODS
from randbatch.partition import fold_seed

__all__ = ["ConvergenceConfig", "run_convergence"]

SOFTMAX = "softmax"
_REFINE = 4  # how much finer the reference is than the finest run
_HALVINGS = range(3, 8)


@dataclass(frozen=True)
class ConvergenceConfig:
    """Errors of random batches at several steps, the slopes through them, and the rates that are proved."""

    system: str = "consensus"
    """One of the systems of `randbatch simulate`, or `softmax`: every estimator of attention on the sphere."""
    run: Path | None = None
    """Folder of a finished training run: the random force in its layers and its end-to-end error, instead."""
    batch_size: tuple[int, ...] | None = None
    """p. Default: 2 8 32; 8 for `softmax`; 32 64 128 256 512 for a run."""
    dt: tuple[float, ...] | None = None
    """Steps τ, whole parts of t1, at least three. Default: t1/8 … t1/128."""
    method: tuple[str, ...] | None = None
    """Of rbm1 and rbmr. Default: both."""
    num_particles: int | None = None
    """N. Default: 64."""
    realisations: int | None = None
    """Starts and noises. Default: 200; 16 for `softmax`; for a run, partitions of each batch size: 8."""
    t1: float | None = None
    """Where the errors are taken. Default: the one of the system."""
    seed: int = 0
    """Of starts, noise and partitions."""
    out: Path | None = None
    """Folder of the results. Default: runs/convergence-<system>-<time>. What is there already is not computed again.
    The results of a run go into the run's own folder."""
    root: Path | None = None
    """Folder of the data sets, for a run. Default: the one of the run."""

    def __post_init__(self) -> None:
        """Check the numbers together with the defaults of the system."""
        if self.run is None:
            _Plan.of(self)
            return
        for name in ("dt", "method", "num_particles", "t1", "out"):
            if getattr(self, name) is not None:
                raise InvalidValue(f"{name} is for systems of particles and must be left out with --run")
        if self.batch_size is not None:
            check_several("batch_size", self.batch_size)
            for size in self.batch_size:
                check_integer("batch_size", size, 2, MOST)
        if self.realisations is not None:
            check_integer("realisations", self.realisations, 2, MOST)
        check_seed("seed", self.seed)


@dataclass(frozen=True)
class _Plan:
    """The settings with every default filled in: two runs of the same plan give the same numbers."""

    system: str
    batch_sizes: list[int]
    dts: list[float]
    methods: list[str]
    num_particles: int
    realisations: int
    t1: float
    seed: int

    @classmethod
    def of(cls, config: ConvergenceConfig) -> _Plan:
        case, softmax = _case_of(config.system), config.system == SOFTMAX
        if config.root is not None:
            raise InvalidValue("root is for the data set of a run and must be left out without --run")
        if softmax and config.method is not None:
            raise InvalidValue("method is for particles; softmax compares the estimators of attention")
        t1 = check_positive("t1", case.t1 if config.t1 is None else config.t1)
        size = case.num_particles if config.num_particles is None else config.num_particles
        check_integer("num_particles", size, 2, MOST)
        realisations = (16 if softmax else 200) if config.realisations is None else config.realisations
        check_integer("realisations", realisations, 2, MOST)
        sizes = list(((8,) if softmax else (2, 8, 32)) if config.batch_size is None else config.batch_size)
        check_several("batch_size", sizes)
        for p in sizes:
            if check_integer("batch_size", p, 2) > size:
                raise InvalidValue(f"batch_size must be at most the number of particles {size}, got {p}")
        dts = [t1 / 2**k for k in _HALVINGS] if config.dt is None else list(config.dt)
        check_several("dt", dts, FEWEST)
        smallest = min(check_positive("dt", dt) for dt in dts)
        for dt in dts:
            check_multiple("t1", t1, "dt", dt)
            check_multiple("dt", dt, "the smallest", smallest)
        methods = list(("rbm1", "rbmr") if config.method is None else config.method)
        check_several("method", methods)
        for method in methods:
            check_choice("method", method, [name for name in METHODS if name != "direct"])
        methods = [] if softmax else methods
        return cls(config.system, sizes, dts, methods, size, realisations, t1, check_seed("seed", config.seed))


def _case_of(name: str) -> Case:
    """The case of a study; softmax has the start of attention on the sphere."""
    check_choice("system", name, [*CASES, SOFTMAX])
    case = CASES["sphere_softmax" if name == SOFTMAX else name]
    if case.why_not:
        raise InvalidValue(f"system {name!r} has no rates to measure: {case.why_not}")
    return case


def run_convergence(config: ConvergenceConfig, *, say: Callable[[str], None] = print) -> None:
    """Measure, print the table, and write points (CSV), table (Markdown) and picture (PNG).

    Raises:
        UserError: a setting that does not fit, a package that is missing, a folder that is somebody else's; `run`
            holds no finished run.
        Interrupted: by Ctrl-C; every finished curve is on the disk.
    """
    if config.run is not None:
        from randbatch.experiments.network import network_convergence  # with all that a run needs

        network_convergence(config.run, config.root, config.batch_size, config.realisations, config.seed, say)
        return
    plan, case = _Plan.of(config), _case_of(config.system)
    for module in ("matplotlib", "tqdm"):  # what is missing shows before a folder is made
        require(module)
    row = start_of(case, 1, 2, 0)[0, 0]  # of one particle
    count = plan.realisations * plan.num_particles
    check_memory("realisations", f"{count} particles in all", 4 * count * row.numel() * row.element_size())
    with open_folder(config.out, f"convergence-{config.system}", asdict(plan), say) as folder:
        errors = _measure_all(config.system, case, plan, folder / "errors.json")
        found = Convergence(config.system, plan.num_particles, errors)
        places = {kind: folder / f"convergence.{kind}" for kind in ("csv", "md", "png")}
        write_text(places["csv"], points_csv(found))
        write_text(places["md"], f"{found}\n")
        draw_convergence(found, places["png"])
    say(f"\n{found}\n\npoints: {places['csv']}\ntable: {places['md']}\npicture: {places['png']}")


def _cosine(x: Tensor) -> Tensor:
    """The mean cosine of two tokens, the observable of attention on the sphere, where `|x|²` is 1."""
    return x.mean(dim=1).square().sum(dim=-1)


def _measure_all(name: str, case: Case, plan: _Plan, kept: Path) -> list[Errors]:
    """All curves; those that are in the file `kept` are taken from it, and others are added to it one by one."""
    x0 = start_of(case, plan.realisations, plan.num_particles, fold_seed(plan.seed, 0) % 2**63)
    noise = BrownianPath(fold_seed(plan.seed, 1), min(plan.dts) / _REFINE)
    seed = fold_seed(plan.seed, 2)
    if name == SOFTMAX:
        parts = softmax_jobs(x0, plan.t1, plan.batch_sizes, noise, seed)
    else:
        system = case.system(plan.num_particles)
        jobs = jobs_of(
            system, x0, plan.t1, plan.methods, plan.batch_sizes, noise, proved=case.lipschitz, seed=seed
        )  # fmt: skip
        parts = [(system, jobs)]
    observable = _cosine if case.view == "cosines" else second_moment
    errors = _read_errors(kept) if kept.exists() else []
    total = len(plan.dts) * sum(len(jobs) for _, jobs in parts)
    with require("tqdm").tqdm(total=total, initial=len(errors) * len(plan.dts), unit="run", disable=None) as bar:
        done = 0
        for system, jobs in parts:
            missing = jobs[max(len(errors) - done, 0) :]
            done += len(jobs)
            reference = _reference(system, x0, plan.t1, noise) if missing else x0
            for job in missing:
                bar.set_description(f"{job.label}, p = {job.batch_size}")
                errors.append(measure(job, reference, plan.dts, observable, bar.update))
                write_record(kept, {"errors": [_errors_to(one) for one in errors]})
    return errors


def _reference(system: System, x0: Tensor, t1: float, noise: BrownianPath) -> Tensor:
    return solve(system, x0, t1, noise.dt, "direct", noise=noise, progress=True).final


def _errors_to(errors: Errors) -> dict[str, Any]:
    content = {name: getattr(errors, name) for name in errors.__dataclass_fields__}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in content.items()}


def _read_errors(path: Path) -> list[Errors]:
    content = read_record(path).get("errors")
    if not isinstance(content, list):
        raise InvalidValue(f"{path} holds no errors of randbatch convergence")
    return [_errors_from(one) for one in content]


def _errors_from(content: dict[str, Any]) -> Errors:
    squared, difference = content.pop("squared"), content.pop("difference")
    return Errors(
        squared=None if squared is None else _tensor(squared), difference=_tensor(difference), **content
    )  # fmt: skip


def _tensor(rows: list[list[float | None]]) -> Tensor:
    """Numbers that are not finite are null in JSON."""
    return torch.tensor([[math.nan if x is None else x for x in row] for row in rows], dtype=torch.float64)
