"""The model of a finished run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from randbatch._errors import InvalidValue, MissingFile
from randbatch.train.checkpoint import load_weights, read_tensors
from randbatch.train.config import RunConfig
from randbatch.train.data import load_dataset
from randbatch.train.folder import RESULT, WEIGHTS, check_same, read_result
from randbatch.train.loop import Trainer
from randbatch.train.stored import from_json, stored_root

__all__ = ["load_run"]


def load_run(folder: Path, root: Path | None = None, device: str = "auto") -> Trainer:
    """The model of a finished run with its best weights, and its data.

    Args:
        folder: of the run.
        root: folder of the data sets. Default: what the run says, if that is the user's own folder `data`.
        device: `"cpu"`, `"cuda"`, …; `"auto"` takes a GPU if there is one.

    Returns:
        A `Trainer`, whose `model` is in eval mode and whose `judged` holds the evaluation graphs.

    Raises:
        MissingFile: the folder holds no finished run; if it holds several, they are named.
        InvalidValue: a file is damaged, the weights are of another model or epoch, or the data are others.
    """
    result = read_result(folder)
    if result is None:
        several = sorted(path.parent.name for path in folder.glob(f"*/{RESULT}"))
        hint = f"; it holds several, name one: {', '.join(several)}" if several else f" ({RESULT} is missing)"
        raise MissingFile(f"run: {folder} is not a finished run{hint}")
    stored = result.get("config")
    if not isinstance(stored, dict):
        raise InvalidValue(f"{folder / RESULT} holds no settings")
    config = from_json(RunConfig, stored | {"device": device}, folder / RESULT)
    config = replace(config, root=stored_root(folder / RESULT, config.dataset, config.root, root))
    dataset = load_dataset(config.dataset, config.root, config.split)
    weights, about = read_tensors(folder / WEIGHTS)
    check_same(folder / WEIGHTS, about, config, dataset)
    if about.get("epoch") != result.get("best_epoch"):
        raise InvalidValue(
            f"{folder / WEIGHTS} is of epoch {about.get('epoch')}, {RESULT} of {result.get('best_epoch')}: "
            "a run that was prolonged and interrupted is not finished"
        )
    trainer = Trainer(config, dataset)
    load_weights(trainer.model, weights, folder / WEIGHTS)
    trainer.model.eval()
    return trainer
