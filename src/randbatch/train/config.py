"""The settings of `randbatch train`. Field docstrings are the text of `--help`; a preset changes the defaults."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from randbatch._checks import (
    MOST,
    check_choice,
    check_integer,
    check_not_negative,
    check_positive,
    check_probability,
    check_seed,
    check_several,
)
from randbatch._errors import InvalidValue
from randbatch.models.graph_transformer import attention_names
from randbatch.models.local import CONVOLUTIONS
from randbatch.nn.config import BatchOptions
from randbatch.train.data import DATASETS
from randbatch.train.machine import check_device

__all__ = ["PRESETS", "RunConfig", "Settings", "SweepConfig", "preset"]

_DEEPEST = 10_000  # layers, and rounds of one layer: more is a slip of the hand


@dataclass
class Settings(BatchOptions):
    """What all runs of a sweep share, the options of random batches among it."""

    dataset: str = "groups"
    """A name (see `randbatch datasets`), the path of an .npz file, or `groups`, the embedded one."""
    root: Path = Path("data")
    """Folder of the data sets; what is missing is downloaded there."""
    preset: str = "groups"
    """Name of the defaults: by default that of the data set, where there is one."""
    epochs: int = 200
    """Passes over the training graphs."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    lr_decay: float = 0.0
    """Share of the epochs, at the end, over which the learning rate falls linearly to zero."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    hidden: int = 64
    """Channels C; a multiple of heads."""
    layers: int = 3
    """Layers, each with message passing, attention and an MLP."""
    heads: int = 4
    """Attention heads."""
    local: Literal["gcn", "sage", "gat", "gin", "off"] = "sage"
    """Message passing."""
    order: Literal["then", "beside"] = "then"
    """Attention after message passing, or beside it."""
    dropout: float = 0.0
    """After each branch and inside the MLP."""
    input_dropout: float = 0.0
    """On the input features."""
    attention_dropout: float = 0.0
    """On attention weights, of `rba` and `full`."""
    graphs_per_step: int = 4
    """Graphs in an optimisation step, where the data set has several."""
    eval_every: int = 1
    """Epochs between evaluations."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes a GPU if there is one."""

    def __post_init__(self) -> None:
        """Check every number now, not when a later run of the sweep comes to it."""
        for name in ("epochs", "graphs_per_step", "eval_every", "hidden", "heads"):
            check_integer(name, getattr(self, name), 1, MOST)
        check_integer("batch_size", self.batch_size, 2, MOST)
        check_integer("layers", self.layers, 0, _DEEPEST)
        check_integer("rounds", self.rounds, 1, _DEEPEST)
        if self.eval_rounds is not None:
            check_integer("eval_rounds", self.eval_rounds, 1, _DEEPEST)
        check_choice("local", self.local, CONVOLUTIONS)
        check_choice("order", self.order, ("then", "beside"))
        if isinstance(self.chunk_batches, int):
            check_integer("chunk_batches", self.chunk_batches, 1, MOST)
        self.config()  # options that have no meaning together
        if self.hidden % self.heads:
            raise InvalidValue(f"hidden must be a multiple of heads, got {self.hidden} and {self.heads}")
        for name in ("dropout", "input_dropout", "attention_dropout"):
            check_probability(name, getattr(self, name))
        check_positive("lr", self.lr)
        check_not_negative("weight_decay", self.weight_decay)
        if not 0 <= check_not_negative("lr_decay", self.lr_decay) <= 1:
            raise InvalidValue(f"lr_decay must lie in [0, 1], got {self.lr_decay}")
        check_device(self.device)

    def lr_of(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 1."""
        left = (self.epochs - epoch + 1) / self.epochs
        return self.lr * min(1.0, left / self.lr_decay) if self.lr_decay else self.lr


@dataclass
class RunConfig(Settings):
    """One training run."""

    attention: str = "rba"
    split: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what is this run's own, too."""
        super().__post_init__()
        check_choice("attention", self.attention, attention_names())
        check_seed("split", self.split, 0)
        check_seed("seed", self.seed)


@dataclass
class SweepConfig(Settings):
    """Train graph transformers: one run for each attention, split and seed; a table and a picture at the end."""

    attention: tuple[str, ...] = ("rba",)
    """Global attention: `rba` (softmax in random batches), `full`, `linear` (of whole graphs), `off`, or any other
    interaction in random batches; several are compared."""
    split: tuple[int, ...] = (0,)
    """Splits of the data set (of `groups`: seeds of the data)."""
    seed: tuple[int, ...] = (0,)
    """Seeds of weights, dropout and partitions."""
    out: Path | None = None
    """Folder of the results. Default: runs/DATASET-TIME."""
    resume: Path | None = None
    """Resume in this folder, with its own settings; if the learning rate is constant, --epochs may be given too."""

    def __post_init__(self) -> None:
        """Check that there is something to run, and that no run would take the folder of another."""
        super().__post_init__()
        for name in ("attention", "split", "seed"):
            check_several(name, getattr(self, name))
        check_choice("preset", self.preset, PRESETS)
        if not self.dataset.endswith(".npz"):
            check_choice("dataset", self.dataset, DATASETS)
        list(self.runs())

    def runs(self) -> Iterator[RunConfig]:
        """The runs, in the order of the table."""
        shared = {field.name: getattr(self, field.name) for field in fields(Settings)}
        for attention, split, seed in itertools.product(self.attention, self.split, self.seed):
            yield RunConfig(**shared, attention=attention, split=split, seed=seed)


def to_json(config: Settings) -> dict[str, Any]:
    """The settings as plain JSON values."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: str(value) if isinstance(value, Path) else getattr(value, "name", value) for name, value in values.items()
    }


def free_settings(config: Settings) -> set[str]:
    """The settings that a resumed run may change: where it runs, and its length if its learning rate is constant."""
    return {"root", "device"} if config.lr_decay else {"root", "device", "epochs"}


PRESETS: dict[str, dict[str, Any]] = {
    "groups": {
        "attention": ("off", "rba", "full"),
        "epochs": 16,
        "lr": 2e-3,
        "lr_decay": 0.5,
        "heads": 2,
        "order": "beside",
    },
    "small-graph": {"lr": 5e-3, "weight_decay": 5e-4, "dropout": 0.5, "layers": 2, "local": "gcn"},
    "large-graph": {"dropout": 0.2, "layers": 5},
}
PRESETS["tolokers"] = PRESETS["large-graph"] | {"epochs": 300, "eval_every": 2}
PRESETS["minesweeper"] = PRESETS["large-graph"] | {"layers": 8, "epochs": 500, "eval_every": 5}
for _name in ("cora", "citeseer", "pubmed"):
    PRESETS[_name] = PRESETS["small-graph"]


def preset(name: str | None, dataset: str) -> SweepConfig:
    """The defaults called `name`; without a name those of the data set, or `large-graph`."""
    if name is None:
        name = dataset if dataset in PRESETS else "large-graph"
    return SweepConfig(dataset=dataset, preset=name, **PRESETS[check_choice("preset", name, PRESETS)])
