"""`randbatch train`: the defaults of its settings are those of a preset, or of the sweep that is resumed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from randbatch.cli.command import PICTURES, Command
from randbatch.train import SweepConfig, load_sweep, preset, train_sweep

__all__ = ["COMMAND"]


def _defaults(words: Sequence[str]) -> SweepConfig:
    first = argparse.ArgumentParser(prog="randbatch train", add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="groups")
    first.add_argument("--preset", default=None)
    first.add_argument("--resume", type=Path, default=None)
    first.add_argument("--root", type=Path, default=None)
    named, _ = first.parse_known_args(words)
    if named.resume is not None:
        return load_sweep(named.resume, named.root)
    return preset(named.preset, named.dataset)


COMMAND = Command(
    "train", "train graph transformers: one run for each attention, split and seed", SweepConfig, train_sweep,
    needs=PICTURES, defaults=_defaults,
)  # fmt: skip
