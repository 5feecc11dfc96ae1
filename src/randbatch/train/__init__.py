"""Train a graph transformer on a node-classification data set. Needs the `train` extra."""

from randbatch.train.config import PRESETS, RunConfig, SweepConfig, preset
from randbatch.train.load import load_run
from randbatch.train.loop import train_run
from randbatch.train.sweep import load_sweep, train_sweep

__all__ = ["PRESETS", "RunConfig", "SweepConfig", "load_run", "load_sweep", "preset", "train_run", "train_sweep"]
