"""`randbatch analyze`: attention errors of a trained run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from randbatch._checks import MOST, check_integer, check_positive, check_seed, check_several
from randbatch._files import write_json, write_text
from randbatch._folders import check_names, locked
from randbatch.analysis import AttentionErrors, attention_error
from randbatch.cli.command import PICTURES, Command
from randbatch.train import load_run
from randbatch.train.machine import check_device

__all__ = ["COMMAND", "AnalyzeConfig", "analyze_run"]


@dataclass(frozen=True)
class AnalyzeConfig:
    """Error of every estimator against exact attention in a trained run, layer by layer and head by head."""

    run: Path
    """Folder of a finished run (`result.json`, `best.safetensors`)."""
    batch_size: tuple[int, ...] = (64, 128, 256)
    """Batch sizes at which errors are measured."""
    num_queries: int = 256
    """Sampled queries whose exact attention is computed."""
    tolerance: float = 0.1
    """Relative error that the batch size and the rounds are chosen for."""
    max_rounds: int = 16
    """Most rounds that are tried."""
    seed: int = 0
    """Seed of the sample and the partitions."""
    root: Path | None = None
    """Folder of the data sets. Default: that of the run, if it lies in `data`."""
    device: str = "auto"
    """`cpu`, `cuda`, …; `auto` takes a GPU if there is one."""

    def __post_init__(self) -> None:
        """Check every number before the run is read."""
        check_several("batch_size", self.batch_size)
        for p in self.batch_size:
            check_integer("batch_size", p, 2, MOST)
        for name in ("num_queries", "max_rounds"):
            check_integer(name, getattr(self, name), 1, MOST)
        check_positive("tolerance", self.tolerance)
        check_seed("seed", self.seed)
        check_device(self.device)


def analyze_run(config: AnalyzeConfig, *, say: Callable[[str], None] = print) -> AttentionErrors:
    """Run the best weights of a run on its (first) evaluation graphs, and write table, JSON and picture beside them.

    Raises:
        MissingFile: the folder holds no finished run.
        InvalidValue: the run has no softmax attention, or a file or a setting is not what it should be.
    """
    trainer = load_run(config.run, config.root, config.device)
    places = {kind: config.run / f"analysis.{kind}" for kind in ("md", "json", "png")}
    with locked(config.run):
        check_names(config.run, [place.name for place in places.values()])
        step = trainer.judged[0]
        found = attention_error(
            trainer.model, step.graph.x, step.edges, step.batch,
            batch_sizes=config.batch_size, num_queries=config.num_queries, tolerance=config.tolerance,
            max_rounds=config.max_rounds, seed=config.seed,
        )  # fmt: skip
        write_text(places["md"], f"{found}\n")
        write_json(places["json"], found.to_dict())
        found.draw(places["png"])
    say(f"{found}\n\ntable: {places['md']}\nnumbers: {places['json']}\npicture: {places['png']}")
    return found


COMMAND = Command(
    "analyze", "error of every estimator against exact attention in a trained run", AnalyzeConfig, analyze_run,
    needs=PICTURES, positional=True,
)  # fmt: skip
