"""What a run has left in its folder: all of it is read and checked before anything is written.

| file | holds |
|---|---|
| `checkpoint.safetensors` | all that the next epoch depends on, and checksums of the log and of the data |
| `log.jsonl` | a line for each epoch; lines after the checkpoint's epoch belong to an interrupted epoch |
| `best.safetensors` | the weights of the best epoch, or of the one after the checkpoint's |
| `result.json` | the scores of a finished run, and what it was made with |

No file is trusted alone: they must agree with each other.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from randbatch._errors import InvalidValue
from randbatch._files import parse_json, read_record, read_text
from randbatch._folders import check_names, check_new, check_settings, first_difference
from randbatch.models.graph_transformer import is_random
from randbatch.train.checkpoint import Checkpoint, check_weights, read_checkpoint, read_tensors
from randbatch.train.config import RunConfig, free_settings, to_json
from randbatch.train.data import Dataset

__all__ = ["CHECKPOINT", "CURVES", "LOG", "RESULT", "WEIGHTS", "Kept", "check_same", "fresh_state", "make_result",
           "read_log", "read_result", "read_run", "settings_of"]  # fmt: skip

CHECKPOINT, WEIGHTS, LOG, RESULT = "checkpoint.safetensors", "best.safetensors", "log.jsonl", "result.json"
CURVES = "curves.png"
_MADE_WITH = ("versions", "commit")


@dataclass(frozen=True, eq=False)
class Kept:
    """A run that was started.

    Attributes:
        checkpoint: of its last whole epoch.
        log: the text of the log up to that epoch.
        lines: the same, parsed.
        result: of all these epochs, if it was written.
    """

    checkpoint: Checkpoint
    log: str
    lines: list[dict[str, Any]]
    result: dict[str, Any] | None

    @property
    def state(self) -> dict[str, Any]:
        """How far it has come, and its best epoch."""
        return dict(self.checkpoint.about["state"])


def fresh_state() -> dict[str, Any]:
    """The state of a run before its first epoch."""
    return {"epoch": 0, "best_epoch": 0, "val": None, "test": None, "peak_memory_bytes": 0}


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that a run keeps when it resumes, all but the `free_settings`."""
    return {name: value for name, value in to_json(config).items() if name not in free_settings(config)}


def read_run(
    folder: Path, config: RunConfig, dataset: Dataset, make: Callable[[], nn.Module], *, beside: Sequence[str] = ()
) -> Kept | None:
    """Read and check what a run has left; None if it has not started.

    Args:
        folder: of the run.
        config: what it must have been made with.
        dataset: what it must have been trained on.
        make: gives a model of that configuration, on any device, the meta device too; called once it is known that the
            folder holds such a run.
        beside: files that may lie in the folder of a run that has not started.

    Raises:
        InvalidValue: a file is damaged, not there, of another run, of other settings or of other data.
    """
    check_names(folder, (CHECKPOINT, WEIGHTS, LOG, RESULT, CURVES))
    if not (folder / CHECKPOINT).exists():
        check_new(folder, beside)
        return None
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    about = checkpoint.about
    _check_state(folder / CHECKPOINT, about)
    check_same(folder, about, config, dataset)
    state = about["state"]
    if state["epoch"] > config.epochs:
        raise InvalidValue(f"{folder} has run {state['epoch']} epochs already, it cannot stop at {config.epochs}")
    model = make()
    checkpoint.check(model, stepped=state["epoch"] > 0)
    log, lines = _read_log(folder / LOG, state["epoch"], about.get("log"))
    _check_best(folder / WEIGHTS, config, dataset, model, state)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    result = _read_result(folder, make_result(config, dataset, state, lines, num_parameters))
    return Kept(checkpoint, log, lines, result)


def make_result(
    config: RunConfig, dataset: Dataset, state: Mapping[str, Any], lines: Sequence[Mapping[str, Any]],
    num_parameters: int, made_with: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The result of a run, by its state and its log."""
    random = is_random(config.attention)
    name = getattr(config.estimator, "name", config.estimator)
    found = {
        "dataset": config.dataset,
        "attention": config.attention,
        "batch_size": config.batch_size if random else None,
        "estimator": name if random else None,
        "rounds": config.rounds if random else None,
        "seed": config.seed,
        "split": config.split,
        "metric": dataset.metric,
        "val": state["val"],
        "test": state["test"],
        "best_epoch": state["best_epoch"],
        "epochs": state["epoch"],
        "seconds_per_epoch": statistics.median(line["seconds"] for line in lines) if lines else None,
        "peak_memory_bytes": state["peak_memory_bytes"],
        "num_parameters": num_parameters,
        "config": to_json(config),
        "data": dataset.fingerprint,
    }
    return found | dict(made_with or {})


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that an interruption cut is left out.

    Raises:
        MissingFile: there is no log.
        InvalidValue: a line is not one of a log.
    """
    lines = _lines(read_text(folder / LOG))
    return [_parse_line(folder / LOG, number, line) for number, line in enumerate(lines, 1)]


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None if it is not finished.

    Raises:
        InvalidValue: the file was changed, or is none of ours.
    """
    check_names(folder, (RESULT,))
    return read_record(folder / RESULT) if (folder / RESULT).exists() else None


def check_same(source: Path, about: Mapping[str, Any], config: RunConfig, dataset: Dataset) -> None:
    """Check that what says `about` of itself was made with these settings and these data.

    Raises:
        InvalidValue: it was not; the message names the setting.
    """
    stored = about.get("settings")
    if not isinstance(stored, dict):
        raise InvalidValue(f"{source} does not say what it was made with")
    check_settings(source, stored, settings_of(config))
    if about.get("data") != dataset.fingerprint:
        raise InvalidValue(f"{source} is of other data: those of {config.dataset!r} are not what it was trained on")


def _check_state(path: Path, about: Mapping[str, Any]) -> None:
    state = about.get("state")
    whole = isinstance(state, dict) and state.keys() == fresh_state().keys()
    if whole and isinstance(state, dict):
        counts = [state[name] for name in ("epoch", "best_epoch", "peak_memory_bytes")]
        judged = state["best_epoch"] != 0
        whole = all(type(count) is int and count >= 0 for count in counts) and counts[1] <= counts[0]
        whole = whole and all(_is_number(state[name]) if judged else state[name] is None for name in ("val", "test"))
    if not whole:
        raise InvalidValue(f"{path} is not a whole checkpoint: it does not say how far the run has come")


def _check_best(path: Path, config: RunConfig, dataset: Dataset, model: nn.Module, state: Mapping[str, Any]) -> None:
    """The best weights are there; those of the next epoch are too, if it was interrupted after they were written."""
    if not path.exists():
        if state["best_epoch"]:
            raise InvalidValue(f"{path} does not exist, but the run has weights of epoch {state['best_epoch']}")
        return
    weights, about = read_tensors(path)
    check_same(path, about, config, dataset)
    check_weights(model, weights, path)
    interrupted = state["epoch"] + 1 if state["epoch"] < config.epochs else None
    if about.get("epoch") not in {state["best_epoch"], interrupted} - {0, None}:
        raise InvalidValue(f"{path} is of epoch {about.get('epoch')}, the best one was {state['best_epoch']}")


def _read_log(path: Path, epochs: int, checksum: object) -> tuple[str, list[dict[str, Any]]]:
    if not epochs and not path.exists():  # interrupted right after its first checkpoint
        return "", []
    lines = _lines(read_text(path))[:epochs]
    text = "".join(lines)
    if len(lines) < epochs:
        raise InvalidValue(f"{path} must hold the {epochs} epochs of the checkpoint, it holds {len(lines)}")
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        raise InvalidValue(f"{path} is not the log of this run, or was changed since it was written")
    return text, [_parse_line(path, number, line) for number, line in enumerate(lines, 1)]


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _parse_line(path: Path, number: int, text: str) -> dict[str, Any]:
    line = parse_json(text, f"{path}, line {number}")
    whole = isinstance(line, dict) and line.get("epoch") == number and {"loss", "seconds"} <= line.keys()
    if not whole or not all(_is_number(value) for value in line.values()):
        raise InvalidValue(f"{path}, line {number} is not the line of epoch {number}")
    return line


def _read_result(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result if it is of all epochs; that of a run that was shorter then is out of date."""
    result = read_result(folder)
    if result is None or (_is_number(result.get("epochs")) and result["epochs"] < expected["epochs"]):
        return None
    if not isinstance(result.get("config"), dict):
        raise InvalidValue(f"{folder / RESULT} holds no settings")
    found = first_difference(_comparable(result), _comparable(expected))
    if found is not None:
        name, there, here = found
        raise InvalidValue(f"{folder / RESULT} says {name} = {there}, checkpoint and log say {here}")
    if set(result) != {*expected, *_MADE_WITH}:
        raise InvalidValue(f"{folder / RESULT} is not the result of a run")
    return result


def _comparable(result: Mapping[str, Any]) -> dict[str, Any]:
    """All that two results of the same run have in common, flat; one may have been shorter at first."""
    free = ("config.root", "config.device", "config.epochs", "config", *_MADE_WITH)
    flat = {**result, **{f"config.{name}": value for name, value in result["config"].items()}}
    return {name: value for name, value in flat.items() if name not in free}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
