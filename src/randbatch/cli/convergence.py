"""`randbatch convergence`: measured rates against proved ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

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
from randbatch._files import write_text
from randbatch._folders import new_place, open_folder
from randbatch._memory import check_memory
from randbatch.cli.command import PICTURES, Command
from randbatch.cli.studies.cases import start_of
from randbatch.cli.studies.network import network_convergence
from randbatch.cli.studies.rates import STUDIES, Plan, Study, measure_all
from randbatch.cli.studies.report import draw_convergence, points_csv
from randbatch.particles.rates import FEWEST, Convergence

__all__ = ["COMMAND", "ConvergenceConfig", "run_convergence"]

_HALVINGS = range(3, 8)


@dataclass(frozen=True)
class ConvergenceConfig:
    """Errors of random batches at several steps, the slopes through them, and the rates that are proved."""

    system: str = "consensus"
    """One of the systems of `randbatch simulate`, or `softmax`: every estimator of attention on the sphere."""
    run: Path | None = None
    """Folder of a finished training run: measure the random force in its layers and its end-to-end error instead."""
    batch_size: tuple[int, ...] | None = None
    """Batch sizes p. Default: 2 8 32; 8 for `softmax`; 32 64 128 256 512 for a run."""
    dt: tuple[float, ...] | None = None
    """Steps τ, at least three; t1 is a multiple of each. Default: t1/8 … t1/128."""
    method: tuple[str, ...] | None = None
    """rbm1, rbmr. Default: both."""
    num_particles: int | None = None
    """Number of particles N. Default: 64."""
    realisations: int | None = None
    """Number of starts and noises. Default: 200; 16 for `softmax`; for a run, 8 partitions of each batch size."""
    t1: float | None = None
    """Time at which the errors are taken. Default: that of the system."""
    seed: int = 0
    """Seed of starts, noise and partitions."""
    out: Path | None = None
    """Folder of the results; curves in it are not computed again. Default: runs/convergence-<system>-<time>; for a run,
    its own folder."""
    root: Path | None = None
    """Folder of the data sets, for a run. Default: that of the run, if it lies in `data`."""

    def __post_init__(self) -> None:
        """Check the settings together with the defaults of the system."""
        if self.run is None:
            _plan_of(self)
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


def _plan_of(config: ConvergenceConfig) -> Plan:
    """The settings with the defaults of the study."""
    study = _study_of(config.system)
    case = study.case
    if config.root is not None:
        raise InvalidValue("root is for the data set of a run and must be left out without --run")
    t1 = check_positive("t1", case.t1 if config.t1 is None else config.t1)
    size = case.num_particles if config.num_particles is None else config.num_particles
    check_integer("num_particles", size, 2, MOST)
    realisations = study.realisations if config.realisations is None else config.realisations
    check_integer("realisations", realisations, 2, MOST)
    sizes = list(study.batch_sizes if config.batch_size is None else config.batch_size)
    check_several("batch_size", sizes)
    for p in sizes:
        if check_integer("batch_size", p, 2) > size:
            raise InvalidValue(f"batch_size must be at most the number of particles {size}, got {p}")
    dts = _dts_of(config, t1)
    methods = _methods_of(config, study)
    return Plan(config.system, sizes, dts, methods, size, realisations, t1, check_seed("seed", config.seed))


def _study_of(name: str) -> Study:
    study = STUDIES[check_choice("system", name, STUDIES)]
    if study.case.why_not:
        raise InvalidValue(f"system {name!r} has no rates to measure: {study.case.why_not}")
    return study


def _dts_of(config: ConvergenceConfig, t1: float) -> list[float]:
    dts = [t1 / 2**k for k in _HALVINGS] if config.dt is None else list(config.dt)
    check_several("dt", dts, FEWEST)
    smallest = min(check_positive("dt", dt) for dt in dts)
    for dt in dts:
        check_multiple("t1", t1, "dt", dt)
        check_multiple("dt", dt, "the smallest", smallest)
    return dts


def _methods_of(config: ConvergenceConfig, study: Study) -> list[str]:
    if config.method is None:
        return list(study.methods)
    if not study.methods:
        raise InvalidValue(f"method is for particles; {config.system} compares the estimators of attention")
    check_several("method", config.method)
    return [check_choice("method", method, study.methods) for method in config.method]


def run_convergence(config: ConvergenceConfig, *, say: Callable[[str], None] = print) -> None:
    """Measure, print the table, and write points (CSV), table (Markdown) and picture (PNG).

    Raises:
        UserError: a setting that does not fit, a missing package, a folder with other results; `run` holds no finished
            run.
        Interrupted: by Ctrl-C; every finished curve is on the disk.
    """
    if config.run is not None:
        network_convergence(config.run, config.root, config.batch_size, config.realisations, config.seed, say)
        return
    plan, case = _plan_of(config), STUDIES[config.system].case
    row = start_of(case, 1, 2, 0)[0, 0]  # of one particle
    count = plan.realisations * plan.num_particles
    check_memory("realisations", f"{count} particles in all", 4 * count * row.numel() * row.element_size())
    folder = config.out or new_place(f"convergence-{config.system}")
    places = {kind: folder / f"convergence.{kind}" for kind in ("csv", "md", "png")}
    with open_folder(folder, asdict(plan), say=say):
        found = Convergence(config.system, plan.num_particles, measure_all(plan, folder / "errors.json"))
        write_text(places["csv"], points_csv(found))
        write_text(places["md"], f"{found}\n")
        draw_convergence(found, places["png"])
    say(f"\n{found}\n\npoints: {places['csv']}\ntable: {places['md']}\npicture: {places['png']}")


COMMAND = Command(
    "convergence", "errors of random batches at several steps, and the rates that are proved", ConvergenceConfig,
    run_convergence, needs=PICTURES,
)  # fmt: skip
