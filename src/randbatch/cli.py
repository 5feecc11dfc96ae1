"""The command line: `randbatch train`, `analyze`, `convergence`, `simulate`, `bench`, `plan` and `datasets`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from randbatch._optional import require
from randbatch.experiments import (
    BenchConfig,
    ConvergenceConfig,
    PlanConfig,
    SimulateConfig,
    run_bench,
    run_convergence,
    run_plan,
    simulate,
)
from randbatch.train import PRESETS, SweepConfig, preset, train_sweep
from randbatch.train.analyze import AnalyzeConfig, analyze_run
from randbatch.train.data import DATASETS
from randbatch.train.sweep import Interrupted, load_sweep

__all__ = ["main"]


@dataclass(frozen=True)
class DatasetsConfig:
    """List the names that `randbatch train --dataset` takes, and the presets."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What the user can mend is one line, without a traceback."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # huge pages: torch asks when it first takes memory; half of a large step on a CPU is page faults otherwise
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        config = _parse(argv)
        if isinstance(config, DatasetsConfig):
            print("data sets:", ", ".join(DATASETS))
            print("presets:", ", ".join(PRESETS))
        elif isinstance(config, AnalyzeConfig):
            analyze_run(config)
        elif isinstance(config, ConvergenceConfig):
            run_convergence(config)
        elif isinstance(config, SimulateConfig):
            simulate(config)
        elif isinstance(config, BenchConfig):
            run_bench(config)
        elif isinstance(config, PlanConfig):
            run_plan(config)
        else:
            train_sweep(config)
    except Interrupted as error:
        print(f"\ninterrupted; go on with: {error.how}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\ninterrupted before anything was written", file=sys.stderr)
        return 130
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        print(f"randbatch: {error}", file=sys.stderr)
        return 2
    return 0


Config = SweepConfig | AnalyzeConfig | ConvergenceConfig | SimulateConfig | BenchConfig | PlanConfig | DatasetsConfig


def _parse(argv: Sequence[str]) -> Config:
    """Parse the arguments; the defaults are those of the preset, or of the run that is resumed."""
    tyro: Any = require("tyro")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="groups")
    first.add_argument("--preset", default=None)
    first.add_argument("--resume", type=Path, default=None)
    named, _ = first.parse_known_args(argv)
    defaults = preset(named.preset, named.dataset) if named.resume is None else load_sweep(named.resume)
    commands: Any = (
        Annotated[SweepConfig, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[AnalyzeConfig, tyro.conf.subcommand("analyze"), tyro.conf.PositionalRequiredArgs]
        | Annotated[ConvergenceConfig, tyro.conf.subcommand("convergence")]
        | Annotated[SimulateConfig, tyro.conf.subcommand("simulate")]
        | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
        | Annotated[PlanConfig, tyro.conf.subcommand("plan")]
        | Annotated[DatasetsConfig, tyro.conf.subcommand("datasets", default=DatasetsConfig())]
    )
    config = tyro.cli(commands, prog="randbatch", args=list(argv))
    if named.resume is not None and isinstance(config, SweepConfig):
        _check_unchanged(config, defaults)
    return config


def _check_unchanged(config: SweepConfig, stored: SweepConfig) -> None:
    """A resumed run keeps its settings; it may become longer, unless its learning rate decays over its epochs."""
    free = () if stored.lr_decay else ("epochs",)
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(stored, field.name)
        if field.name not in free and ours != theirs:
            raise ValueError(f"{field.name}: {config.resume} was started with {theirs}, it cannot go on with {ours}")


if __name__ == "__main__":
    sys.exit(main())
