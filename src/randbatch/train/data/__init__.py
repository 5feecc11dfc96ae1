"""Data sets by name."""

from __future__ import annotations

from pathlib import Path

from randbatch._checks import check_choice, check_integer
from randbatch.train.data.graph import Dataset, Graph, Metric
from randbatch.train.data.groups import GroupsOptions, make_groups
from randbatch.train.data.npz import load_npz
from randbatch.train.data.ogb import OGB_DATASETS, load_ogb
from randbatch.train.data.pyg import PYG_DATASETS, load_pyg

__all__ = ["DATASETS", "Dataset", "Graph", "GroupsOptions", "Metric", "load_dataset", "make_groups", "needs_root"]

DATASETS = ("groups", *PYG_DATASETS, *OGB_DATASETS)


def load_dataset(name: str, root: Path, split: int = 0) -> Dataset:
    """Load the data set called `name` (one of `DATASETS`), or the file it is the path of (`….npz`).

    The libraries behind some names unpickle files under `root`, which runs any code that lies there: load from a folder
    of your own. `needs_root` says which names these are. An `.npz` is read without pickle.

    Raises:
        InvalidValue: an unknown name (the nearest one is suggested), a split that is not there, a file that is not
            whole, numbers that cannot be trained on.
        MissingFile: the files are not there and cannot be downloaded.
        MissingExtra: the library behind the name is not installed.
    """
    check_integer("split", split, 0)
    if name.endswith(".npz"):
        return load_npz(Path(name), split)
    check_choice("dataset", name, DATASETS)
    if name == "groups":
        return make_groups(split)
    return load_pyg(name, root, split) if name in PYG_DATASETS else load_ogb(name, root, split)


def needs_root(name: str) -> bool:
    """Whether a data set is read from files under `root`, by a library that unpickles them."""
    return name in (*PYG_DATASETS, *OGB_DATASETS) and name != "karate"
