"""Measured rates of convergence: what can be studied under a name, and the errors of all its curves.

Shape letters: R realisations, N particles, S columns of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randbatch._errors import InvalidValue
from randbatch._files import read_record, write_record
from randbatch._optional import require
from randbatch.cli.studies.cases import CASES, Case, start_of
from randbatch.cli.studies.softmax import softmax_jobs
from randbatch.particles import BrownianPath, System, solve
from randbatch.particles.convergence import Job, jobs_of, measure
from randbatch.particles.rates import Errors
from randbatch.particles.solver import RANDOM_METHODS
from randbatch.partition import fold_seed

__all__ = ["STUDIES", "Plan", "Study", "measure_all"]

_REFINE = 4  # how much finer the reference is than the finest run

Part = tuple[System, list[Job]]
"""Runs, and the system whose direct sum they are compared with."""


@dataclass(frozen=True)
class Plan:
    """The settings of a study with every default filled in. The same plan gives the same numbers."""

    system: str
    batch_sizes: list[int]
    dts: list[float]
    methods: list[str]
    num_particles: int
    realisations: int
    t1: float
    seed: int


@dataclass(frozen=True)
class Study:
    """What is measured under a name, and its defaults.

    Attributes:
        case: the system, its start and what is observed.
        parts: from case, plan, start `[R, N, S]`, noise and seed to what is run.
        methods: of random batches, by default all. Empty: there is nothing to choose.
        batch_sizes: p, by default.
        realisations: R, by default.
    """

    case: Case
    parts: Callable[[Case, Plan, Tensor, BrownianPath, int], list[Part]]
    methods: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = (2, 8, 32)
    realisations: int = 200


def _parts_of_system(case: Case, plan: Plan, x0: Tensor, noise: BrownianPath, seed: int) -> list[Part]:
    """Every method of random batches at every batch size."""
    system = case.system(plan.num_particles)
    jobs = jobs_of(system, x0, plan.t1, plan.methods, plan.batch_sizes, noise, proved=case.lipschitz, seed=seed)
    return [(system, jobs)]


def _parts_of_softmax(case: Case, plan: Plan, x0: Tensor, noise: BrownianPath, seed: int) -> list[Part]:
    """Every estimator at every batch size."""
    return softmax_jobs(x0, plan.t1, plan.batch_sizes, noise, seed)


STUDIES: dict[str, Study] = {name: Study(case, _parts_of_system, tuple(RANDOM_METHODS)) for name, case in CASES.items()}
STUDIES["softmax"] = Study(CASES["sphere_softmax"], _parts_of_softmax, batch_sizes=(8,), realisations=16)
"""Name → study: the systems of particles, and the estimators of attention on the sphere."""


def measure_all(plan: Plan, stored: Path) -> list[Errors]:
    """The errors of all curves; those in the file `stored` are taken from it, and the others are added one by one."""
    study = STUDIES[plan.system]
    x0 = start_of(study.case, plan.realisations, plan.num_particles, fold_seed(plan.seed, 0) % 2**63)
    noise = BrownianPath(fold_seed(plan.seed, 1), min(plan.dts) / _REFINE)
    parts = study.parts(study.case, plan, x0, noise, fold_seed(plan.seed, 2))
    errors = _read_errors(stored) if stored.exists() else []
    total = len(plan.dts) * sum(len(jobs) for _, jobs in parts)
    with require("tqdm").tqdm(total=total, initial=len(errors) * len(plan.dts), unit="run", disable=None) as bar:
        done = 0
        for system, jobs in parts:
            missing = jobs[max(len(errors) - done, 0) :]
            done += len(jobs)
            reference = _reference(system, x0, plan.t1, noise) if missing else x0
            for job in missing:
                bar.set_description(f"{job.label}, p = {job.batch_size}")
                errors.append(measure(job, reference, plan.dts, study.case.observable, bar.update))
                write_record(stored, {"errors": [_errors_to(one) for one in errors]})
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
    """Values that are not finite are null in JSON."""
    return torch.tensor([[math.nan if x is None else x for x in row] for row in rows], dtype=torch.float64)
