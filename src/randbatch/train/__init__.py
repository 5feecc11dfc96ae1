"""Train a graph transformer on a node-classification data set. Needs the `train` extra."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from randbatch.train.analyze import AnalyzeConfig, analyze_run
    from randbatch.train.config import PRESETS, RunConfig, SweepConfig, preset
    from randbatch.train.loop import train_run
    from randbatch.train.sweep import train_sweep

__all__ = ["PRESETS", "AnalyzeConfig", "RunConfig", "SweepConfig", "analyze_run", "preset", "train_run", "train_sweep"]

_HOMES = {
    "analyze": ("AnalyzeConfig", "analyze_run"),
    "config": ("PRESETS", "RunConfig", "SweepConfig", "preset"),
    "loop": ("train_run",),
    "sweep": ("train_sweep",),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: some of it needs packages that the rest does not."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
