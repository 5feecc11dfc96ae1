"""Attention errors of a trained run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from randbatch._checks import MOST, check_integer, check_positive, check_seed, check_several
from randbatch._errors import InvalidValue, MissingFile, UserError
from randbatch._files import write_json, write_text
from randbatch._folders import check_names, locked
from randbatch.analysis import AttentionErrors, attention_error
from randbatch.train.checkpoint import load_weights, read_tensors
from randbatch.train.config import RunConfig
from randbatch.train.data import load_dataset
from randbatch.train.folder import RESULT, WEIGHTS, check_same, read_result
from randbatch.train.loop import Trainer
from randbatch.train.machine import check_device
from randbatch.train.sweep import stored_root

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
    """Folder of the data sets. Default: the one of the run, if it lies in `data`."""
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


def load_run(folder: Path, root: Path | None = None, device: str = "auto") -> Trainer:
    """The model of a finished run with its best weights, and its data.

    Args:
        folder: of the run.
        root: folder of the data sets. Default: what the run says, if that is the user's own (see `stored_root`).
        device: where to.

    Raises:
        MissingFile: the folder holds no finished run; if it holds several, they are named.
        InvalidValue: a file is damaged, the weights are of another model or epoch, or the data are others.
    """
    result = read_result(folder)
    if result is None:
        several = sorted(path.parent.name for path in folder.glob(f"*/{RESULT}"))
        hint = f"; it holds several, name one: {', '.join(several)}" if several else f" ({RESULT} is missing)"
        raise MissingFile(f"run: {folder} is not a finished run{hint}")
    config = _config_of(folder / RESULT, result, root, device)
    dataset = load_dataset(config.dataset, config.root, config.split)
    weights, about = read_tensors(folder / WEIGHTS)
    check_same(folder / WEIGHTS, about, config, dataset)
    if about.get("epoch") != result.get("best_epoch"):
        raise InvalidValue(
            f"{folder / WEIGHTS} is of epoch {about.get('epoch')}, {RESULT} of {result.get('best_epoch')}: "
            "a run that is being prolonged is not finished"
        )
    trainer = Trainer(config, dataset)
    load_weights(trainer.model, weights, folder / WEIGHTS)
    trainer.model.eval()
    return trainer


def _config_of(path: Path, result: dict[str, Any], root: Path | None, device: str) -> RunConfig:
    """The settings that a result was made with, on the device and with the data of now."""
    settings: Any = result.get("config")
    if not isinstance(settings, dict) or set(settings) != {field.name for field in fields(RunConfig)}:
        raise InvalidValue(f"{path} does not hold the settings of a run of this version")
    try:
        stored, name = Path(settings["root"]), settings["dataset"]
        if not isinstance(name, str):
            raise TypeError(f"dataset must be a name, got {name!r}")
        changed: dict[str, Any] = {"root": stored, "device": device}
        config = RunConfig(**(settings | changed))
        check_integer("split", config.split, 0)
    except UserError:
        raise
    except Exception as error:  # of any value where another type is due
        raise InvalidValue(f"{path} does not hold the settings of a run: {error}") from error
    return replace(config, root=stored_root(path, config.dataset, stored, root))
