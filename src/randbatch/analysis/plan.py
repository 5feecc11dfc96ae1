"""What a training step of a graph transformer needs of memory, and the batch size that fits.

The step is run on two small graphs with as many edges a node, and its peak is a straight line in the number of nodes:
so the plan knows what the model does by doing it, and not by a formula that would have to follow every change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal

import torch
import torch.nn.functional as F

from randbatch._checks import check_choice, check_integer, check_probability
from randbatch._errors import InvalidValue
from randbatch._memory import check_memory
from randbatch.execution.projected import batches_of_a_chunk
from randbatch.models import GraphTransformer

__all__ = ["Plan", "PlanRow", "peak_allocated", "plan"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)
}
_SMALL = 2048  # nodes at least, and four pieces
_CLASSES = 16


@dataclass(frozen=True)
class PlanRow:
    """One way to train.

    Attributes:
        batch_size: p.
        chunk_batches: batches at a time, see `GraphTransformer`; None: all at once.
        peak_bytes: predicted peak of everything that torch allocates, from the features to the optimizer.
        fits: whether that is at most the memory.
    """

    batch_size: int
    chunk_batches: int | None
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `print` it for a table.

    Attributes:
        memory: bytes there are.
        rows: every way that was looked at.
        best: the largest p that fits, without pieces if possible; None if nothing fits.
    """

    memory: int
    rows: list[PlanRow]
    best: PlanRow | None

    def __str__(self) -> str:
        lines = ["| p | batches at a time | predicted peak GB | fits |", "|---|---|---|---|"]
        for row in self.rows:
            chunk = "all" if row.chunk_batches is None else str(row.chunk_batches)
            mark = "yes, best" if row == self.best else "yes" if row.fits else "no"
            lines.append(f"| {row.batch_size} | {chunk} | {row.peak_bytes / 1e9:.2f} | {mark} |")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Case:
    num_nodes: int
    num_edges: int
    features: int
    settings: dict[str, Any]
    dtype: torch.dtype
    device: torch.device


def plan(
    num_nodes: int,
    num_edges: int,
    *,
    memory: str | int,
    features: int = 64,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 4,
    local: str = "sage",
    estimator: str = "plain",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    batch_sizes: Sequence[int] = (64, 128, 256, 512, 1024),
    chunk_batches: Sequence[int | None] = (None, 8),
    device: str | torch.device = "cpu",
) -> Plan:
    """The batch size and the chunking with which a `GraphTransformer` trains on a whole graph in the memory there is.

    For every choice a step (forward, backward, AdamW) is run on two random graphs of a few thousand nodes, and the peak
    of the allocator is continued in a straight line, `peak = a + b N` at a constant number of edges a node. What the
    process itself takes (Python, torch, a GPU's context: 0.3 to 0.6 GB) comes on top.

    Args:
        num_nodes: N.
        num_edges: E, directed.
        memory: `"24GB"`, `"24GiB"`, or an int of bytes; a text must have a unit.
        features: input features of a node.
        hidden: channels.
        layers: of the model.
        heads: of the attention.
        local: message passing, see `GraphTransformer`.
        estimator: of the attention.
        dropout: of the layers.
        dtype: of features and parameters.
        batch_sizes: p >= 2 each, to choose from; larger is more accurate.
        chunk_batches: batches at a time, to choose from; None is faster, and an int saves memory.
        device: where the small graphs are run.

    Returns:
        A `Plan`.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number out of range, an unknown name or unit.

    Example:
        >>> found = plan(10**6, 10**7, memory="16GB", batch_sizes=(128,), chunk_batches=(None,), layers=1)
        >>> found.best.batch_size
        128
    """
    check_integer("num_nodes", num_nodes, 2)
    check_integer("num_edges", num_edges, 0)
    limit = parse_memory(memory)
    for name, value in (("hidden", hidden), ("heads", heads), *(("chunk_batches", c) for c in chunk_batches if c)):
        check_integer(name, value, 1)
    check_integer("layers", layers, 0)
    check_probability("dropout", dropout)
    if hidden % heads:
        raise InvalidValue(f"hidden must be a multiple of heads, got {hidden} and {heads}")
    settings = {"channels": hidden, "layers": layers, "heads": heads, "local": local, "estimator": estimator}
    case = _Case(num_nodes, num_edges, check_integer("features", features, 1), settings | {"dropout": dropout}, dtype,
                 torch.device(device))  # fmt: skip
    rows: list[PlanRow] = []
    for chunk in chunk_batches:
        for size in sorted({check_integer("batch_sizes", p, 2) for p in batch_sizes}):
            changed = case.settings | {"batch_size": size, "chunk_batches": chunk}
            # on a CPU the layer goes by pieces in any case; on a GPU more nodes than it takes do no harm
            peak = _predict(replace(case, settings=changed), size, chunk or batches_of_a_chunk(size, hidden, dtype))
            rows.append(PlanRow(size, chunk, peak, peak <= limit))
    fitting = [row for row in rows if row.fits]
    best = max(fitting, key=lambda row: (row.batch_size, row.chunk_batches is None), default=None)
    return Plan(limit, rows, best)


def parse_memory(memory: str | int) -> int:
    """Bytes: `"24GB"` is 24 · 10⁹ and `"24GiB"` 24 · 2³⁰.

    >>> parse_memory("1.5GB"), parse_memory("2 KiB")
    (1500000000, 2048)
    """
    if isinstance(memory, int):
        return check_integer("memory", memory, 1)
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]+)\s*", memory)
    if match is None:
        raise InvalidValue(f"memory must be a number and its unit, such as '24GB' or '24GiB', got {memory[:80]!r}")
    number = Decimal(match[1]) * _UNITS[check_choice("memory's unit", match[2].upper(), _UNITS)]
    return check_integer("memory", int(number), 1)


def _predict(case: _Case, batch_size: int, chunk: int) -> int:
    """The peak at N nodes, from two small graphs with as many edges a node; exactly N if that is small.

    The small ones are several pieces, since up to there the peak grows faster.
    """
    small = max(_SMALL, 4 * batch_size * chunk)
    if case.num_nodes <= 2 * small:
        return _peak_of(case)
    sizes = (small, 2 * small)
    degree = case.num_edges / case.num_nodes
    low, high = (_peak_of(replace(case, num_nodes=size, num_edges=round(degree * size))) for size in sizes)
    return round(low + (high - low) / (sizes[1] - sizes[0]) * (case.num_nodes - sizes[0]))


def _peak_of(case: _Case) -> int:
    """Of two steps on a random graph: the second finds the optimizer's state there."""
    hidden, layers = case.settings["channels"], case.settings["layers"]
    least = 8 * 2 * case.num_edges + case.dtype.itemsize * (
        case.num_nodes * (case.features + 4 * hidden * layers)  # what backward keeps is more
        + 4 * hidden * (case.features + 8 * hidden * layers)  # parameters, their gradients and the optimizer's two
    )
    what = f"a graph of {case.num_nodes} nodes and {case.num_edges} edges, on which the step is tried out,"
    check_memory("the plan", what, least, case.device)

    def train() -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(case.num_nodes, case.features, generator=generator).to(case.device, case.dtype)
        y = torch.randint(_CLASSES, (case.num_nodes,), generator=generator).to(case.device)
        edge_index = torch.randint(case.num_nodes, (2, case.num_edges), generator=generator).to(case.device)
        model = GraphTransformer(case.features, _CLASSES, **case.settings).to(case.device, case.dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        edges = model.prepare_edges(edge_index, case.num_nodes)
        del edge_index
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x, edges), y).backward()
            optimizer.step()

    return peak_allocated(train, case.device)


def peak_allocated(function: Callable[[], object], device: torch.device | Literal["cpu"] = "cpu") -> int:
    """Bytes that torch's allocator holds at most while `function` runs, above what it held before.

    Operators' own scratch is counted, what the process and other libraries take is not.

    >>> 16_000 <= peak_allocated(lambda: torch.ones(1000, dtype=torch.float64) + 1) < 17_000  # operand and result
    True
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read once, at the first profile: it tells of itself on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    recorded: Any = profiler.profiler
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak
