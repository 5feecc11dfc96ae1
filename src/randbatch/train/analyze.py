"""Attention errors of a trained run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from randbatch._files import write_json, write_text
from randbatch.analysis import AttentionErrors, attention_error
from randbatch.train.checkpoint import load_weights, read_tensors
from randbatch.train.config import RunConfig
from randbatch.train.data import load_dataset
from randbatch.train.loop import RESULT, WEIGHTS, Trainer, read_result

__all__ = ["AnalyzeConfig", "analyze_run", "load_run"]


@dataclass(frozen=True)
class AnalyzeConfig:
    """Error of every estimator against exact attention in a trained run, layer by layer and head by head."""

    run: Path
    """Folder of a finished run (`result.json`, `best.safetensors`)."""
    batch_size: tuple[int, ...] = (64, 128, 256)
    """Batch sizes at which errors are measured."""
    num_queries: int = 256
    """Sampled queries whose exact attention is compared."""
    tolerance: float = 0.1
    """Relative error for which the batch size and the rounds are sought."""
    max_rounds: int = 16
    """Where the search for rounds stops."""
    seed: int = 0
    """Of the sample and the partitions."""
    root: Path | None = None
    """Folder of the data sets. Default: the one of the run."""
    device: str = "auto"
    """`cpu`, `cuda`, …; `auto` takes a GPU if there is one."""


def analyze_run(config: AnalyzeConfig, *, say: Callable[[str], None] = print) -> AttentionErrors:
    """Run the best weights of a run on its (first) evaluation graphs, and write table, JSON and picture beside them.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: the run has no softmax attention, or a file or a setting is not what it should be.
    """
    trainer = load_run(config.run, config.root, config.device)
    step = trainer.judged[0]
    found = attention_error(
        trainer.model, step.graph.x, step.edges, step.batch,
        batch_sizes=config.batch_size, num_queries=config.num_queries, tolerance=config.tolerance,
        max_rounds=config.max_rounds, seed=config.seed,
    )  # fmt: skip
    places = {kind: config.run / f"analysis.{kind}" for kind in ("md", "json", "png")}
    write_text(places["md"], f"{found}\n")
    write_json(places["json"], found.to_dict())
    found.draw(places["png"])
    say(f"{found}\n\ntable: {places['md']}\nnumbers: {places['json']}\npicture: {places['png']}")
    return found


def load_run(folder: Path, root: Path | None = None, device: str = "auto") -> Trainer:
    """The model of a finished run with its best weights, and its data.

    Raises:
        FileNotFoundError: the folder holds no finished run; if it holds several, they are named.
        ValueError: the weights are of another model.
    """
    result = read_result(folder)
    if result is None:
        several = sorted(path.parent.name for path in folder.glob(f"*/{RESULT}"))
        hint = f"; it holds several, name one: {', '.join(several)}" if several else f" ({RESULT} is missing)"
        raise FileNotFoundError(f"run: {folder} is not a finished run{hint}")
    known = {field.name for field in fields(RunConfig)}
    settings: dict[str, Any] = {name: value for name, value in result["config"].items() if name in known}
    settings |= {"root": Path(settings.get("root", "data")) if root is None else root, "device": device}
    config = RunConfig(**settings)
    trainer = Trainer(config, load_dataset(config.dataset, config.root, config.split))
    load_weights(trainer.model, read_tensors(folder / WEIGHTS)[0], folder / WEIGHTS)
    trainer.model.eval()
    return trainer
