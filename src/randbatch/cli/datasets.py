"""`randbatch datasets`: the names that `randbatch train` takes."""

from __future__ import annotations

from dataclasses import dataclass

from randbatch.cli.command import Command
from randbatch.train import PRESETS
from randbatch.train.data import DATASETS

__all__ = ["COMMAND", "DatasetsConfig", "list_datasets"]


@dataclass(frozen=True)
class DatasetsConfig:
    """List the names that `randbatch train --dataset` takes, and the presets."""


def list_datasets(_: DatasetsConfig) -> None:
    """Print the names."""
    print("data sets:", ", ".join(DATASETS))
    print("presets:", ", ".join(PRESETS))


COMMAND = Command("datasets", "the names that train takes", DatasetsConfig, list_datasets)
