"""Train a graph transformer on a node-classification data set. Needs the `train` extra."""

from randbatch.train.analyze import AnalyzeConfig, analyze_run
from randbatch.train.config import PRESETS, RunConfig, SweepConfig, preset
from randbatch.train.loop import train_run
from randbatch.train.sweep import train_sweep

__all__ = ["PRESETS", "AnalyzeConfig", "RunConfig", "SweepConfig", "analyze_run", "preset", "train_run", "train_sweep"]
