"""`randbatch plan`: the batch size and the chunking that fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from randbatch._checks import MOST, check_choice, check_integer, check_probability, check_several
from randbatch._errors import InvalidValue, UserError
from randbatch._files import check_replaceable, read_json, write_json
from randbatch.analysis import Plan, plan
from randbatch.analysis.plan import parse_memory
from randbatch.cli.command import Command
from randbatch.estimators import ESTIMATORS

__all__ = ["COMMAND", "PlanConfig", "run_plan"]

_LARGEST = 2**62  # an index of torch
_DEEPEST = 10_000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class PlanConfig:
    """Peak memory of training a graph transformer on a whole graph, and the batch size that fits."""

    nodes: int
    """Number of nodes N."""
    edges: int
    """Number of directed edges E."""
    memory: str = "16GB"
    """Memory to fit into: 16GB is 16 · 10⁹ bytes, 16GiB is 16 · 2³⁰."""
    features: int = 64
    """Input features of a node."""
    hidden: int = 64
    """Channels C; a multiple of heads."""
    layers: int = 3
    """Layers of the model."""
    heads: int = 4
    """Attention heads."""
    local: Literal["gcn", "sage", "gat", "gin", "off"] = "sage"
    """Message passing."""
    estimator: str = "plain"
    """How in-batch outputs estimate full attention; `corrected` takes all batches at once."""
    dropout: float = 0.0
    """Dropout of the layers."""
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Dtype of features and parameters."""
    batch_size: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Batch sizes p to choose from."""
    chunk_batches: int = 8
    """Random batches at a time, where not all fit at once."""
    out: Path | None = None
    """JSON file of the result. Default: none."""

    def __post_init__(self) -> None:
        """Check every number before a graph is made."""
        check_integer("nodes", self.nodes, 2, _LARGEST)
        check_integer("edges", self.edges, 0, _LARGEST)
        parse_memory(self.memory)
        for name in ("features", "hidden", "heads", "chunk_batches"):
            check_integer(name, getattr(self, name), 1, MOST)
        check_integer("layers", self.layers, 0, _DEEPEST)
        if self.hidden % self.heads:
            raise InvalidValue(f"hidden must be a multiple of heads, got {self.hidden} and {self.heads}")
        check_probability("dropout", self.dropout)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_several("batch_size", self.batch_size)
        for size in self.batch_size:
            check_integer("batch_size", size, 2, MOST)


def _check_out(path: Path) -> None:
    """Refuse to replace what is not a plan."""
    check_replaceable(path)
    if not path.exists():
        return
    try:
        content = read_json(path)
    except UserError:
        content = None
    if not (isinstance(content, dict) and {field.name for field in fields(Plan)} == content.keys()):
        raise InvalidValue(f"out: {path} exists and holds no plan; choose another file")


def run_plan(config: PlanConfig, *, say: Callable[[str], None] = print) -> Plan:
    """Predict peak memory and print the table.

    Raises:
        UserError: a setting that does not fit, or a package that is missing.
    """
    if config.out is not None:
        _check_out(config.out)  # before minutes of work
    found = plan(
        config.nodes, config.edges, memory=config.memory, features=config.features, hidden=config.hidden,
        layers=config.layers, heads=config.heads, local=config.local, estimator=config.estimator,
        dropout=config.dropout, dtype=_DTYPES[config.dtype], batch_sizes=config.batch_size,
        chunk_batches=(None, config.chunk_batches) if ESTIMATORS[config.estimator].can_chunk else (None,),
    )  # fmt: skip
    say(f"{found}\n\nThe process itself takes another 0.3 to 0.6 GB.")
    if config.out is not None:
        write_json(config.out, asdict(found))
        say(f"numbers: {config.out}")
    return found


COMMAND = Command("plan", "the batch size that fits into memory", PlanConfig, run_plan)
