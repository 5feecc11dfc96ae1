"""`randbatch bench`: time and memory of a layer's training step against N, beside its peers."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._checks import MOST, check_choice, check_integer, check_several
from randbatch._errors import InvalidValue
from randbatch._files import parse_json, read_text, write_picture, write_text
from randbatch._memory import check_memory
from randbatch._optional import new_figure, require
from randbatch.analysis.plan import peak_allocated
from randbatch.experiments.folders import open_folder
from randbatch.experiments.peers import PEERS
from randbatch.train.machine import check_device, commit, pick_device, versions

__all__ = ["BenchConfig", "run_bench"]

_MOST_TOKENS = 2**62  # an index of torch
_ROW = ("case", "tokens", "seconds", "median", "peak_bytes")


@dataclass(frozen=True)
class BenchConfig:
    """Time and memory of forward and backward of an attention layer, ours and others, against N."""

    case: tuple[str, ...] = tuple(PEERS)
    """Of layer, pieces (chunk_batches=auto), naive, full, performer, sgformer, polynormer."""
    tokens: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)
    """N, multiples of the batch size."""
    channels: int = 64
    """C."""
    heads: int = 4
    """H."""
    batch_size: int = 128
    """p."""
    most_of_full: int = 16_384
    """N above which what takes O(N²) time is left out."""
    turns: int = 5
    """Timed steps; all cases take turns, and the first turn is not counted."""
    device: str = "auto"
    """cpu, cuda, …; auto takes a GPU if there is one."""
    out: Path | None = None
    """Folder of the results. Default: runs/bench-<time>."""

    def __post_init__(self) -> None:
        """Check everything that does not depend on the machine."""
        check_several("case", self.case)
        for name in self.case:
            check_choice("case", name, PEERS)
        check_integer("batch_size", self.batch_size, 2, MOST)
        check_several("tokens", self.tokens)
        for size in self.tokens:
            if check_integer("tokens", size, 1, _MOST_TOKENS) % self.batch_size:
                raise InvalidValue(f"tokens must be multiples of the batch size {self.batch_size}, got {size}")
        for name in ("channels", "heads", "turns"):
            check_integer(name, getattr(self, name), 1, MOST)
        if self.channels % self.heads:
            raise InvalidValue(f"channels must be a multiple of heads, got {self.channels} and {self.heads}")
        check_integer("most_of_full", self.most_of_full, 0, _MOST_TOKENS)
        check_device(self.device)


def run_bench(config: BenchConfig, *, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Check, time, measure memory; print the table, write rows (JSONL), table (Markdown) and picture (PNG).

    Raises:
        AssertionError: what should compute the same does not: nothing was timed.
        UserError: a setting that does not fit, a package that is missing, a folder that is somebody else's.
        Interrupted: by Ctrl-C; the rows of every finished N are on the disk.
    """
    device = pick_device(config.device)
    numbers = 3 * max(config.tokens) * config.channels  # input, output, gradient
    check_memory("tokens", max(config.tokens), numbers * torch.finfo(torch.float32).bits // 8, device)
    for name in config.case:  # a package that is missing shows now
        PEERS[name].make(config.channels, config.heads, config.batch_size)
    _check(config, config.case, device)
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    with open_folder(config.out, "bench", json.loads(json.dumps(settings)), say) as folder:
        stored = folder / "bench.jsonl"
        rows = _read_rows(stored)
        missing = sorted(set(config.tokens) - {row["tokens"] for row in rows})
        made = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "versions": versions(device)}
        for size in require("tqdm").tqdm(missing, unit="N", disable=None):
            some = [name for name in config.case if not PEERS[name].quadratic or size <= config.most_of_full]
            rows += [row | {"settings": settings} | made for row in _measure(config, some, size, device)]
            write_text(stored, "".join(json.dumps(row) + "\n" for row in rows))
        table = _table(rows)
        write_text(folder / "bench.md", f"{table}\n")
        _draw(config, rows, folder / "bench.png")
    say(f"\n{table}\n\nrows: {stored}\ntable: {folder / 'bench.md'}\npicture: {folder / 'bench.png'}")
    return rows


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier call; an `InvalidValue` names a line that is none of them."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else [], 1):
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict) or not set(_ROW) <= row.keys() or row["case"] not in PEERS:
            raise InvalidValue(f"{path}, line {number} is not a row of randbatch bench")
        rows.append(row)
    return rows


def _check(config: BenchConfig, names: Sequence[str], device: torch.device) -> None:
    """What computes the same attention in one batch of all tokens must agree, outputs and gradients."""
    size = config.batch_size
    x = torch.randn(size, config.channels, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    found: dict[str, tuple[Tensor, ...]] = {}
    weights: dict[str, Any] | None = None
    for name in ["layer", *(name for name in names if PEERS[name].same and name != "layer")]:
        module, function = PEERS[name].make(config.channels, config.heads, size)
        module.to(device)
        if weights is None:
            weights = module.state_dict()
        module.load_state_dict(weights)
        out = function(x)
        found[name] = (out, *torch.autograd.grad(out, [x, *module.parameters()], grad))
    for name, tensors in found.items():
        for tensor, expected in zip(tensors, found["layer"], strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


def _measure(config: BenchConfig, names: Sequence[str], size: int, device: torch.device) -> list[dict[str, Any]]:
    """One N: seconds of every turn and the peak of the allocator above parameters and input."""
    x = torch.randn(size, config.channels, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    made = {name: PEERS[name].make(config.channels, config.heads, config.batch_size) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    for turn in range(config.turns + 1):
        for name, (module, function) in made.items():
            step = _step(module.to(device), function, x, grad)
            if turn == 0:
                peaks[name] = peak_allocated(step, device)
                continue
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            found[name].append(time.perf_counter() - start)
    return [
        {"case": name, "tokens": size, "seconds": sorted(times), "median": statistics.median(times),
         "peak_bytes": peaks[name]}
        for name, times in found.items()
    ]  # fmt: skip


def _step(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        module.zero_grad()
        function(x).backward(grad)

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Median, fastest and slowest step, and the peak."""
    lines = [
        "| case | N | ms (fastest to slowest) | ns / token | peak MB | bytes / token |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (list(PEERS).index(row["case"]), row["tokens"])):
        times = [1e3 * seconds for seconds in row["seconds"]]
        size, peak = row["tokens"], row["peak_bytes"]
        lines.append(
            f"| {row['case']} | {size} | {1e3 * row['median']:.1f} ({times[0]:.1f} to {times[-1]:.1f}) "
            f"| {1e9 * row['median'] / size:.0f} | {peak / 1e6:.1f} | {peak / size:.0f} |"
        )
    return "\n".join(lines)


def _draw(config: BenchConfig, rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = new_figure(1, 2, figsize=(10, 4.2))
    for name in config.case:
        mine = [row for row in rows if row["case"] == name]
        sizes = [row["tokens"] for row in mine]
        style = {"marker": "o", "markersize": 4, "label": name, "linewidth": 2 if name == "layer" else 1.2}
        left.plot(sizes, [row["median"] for row in mine], **style)
        right.plot(sizes, [row["peak_bytes"] / 1e6 for row in mine], **style)
    for axes, label in ((left, "seconds, forward and backward"), (right, "peak MB above parameters and input")):
        axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(f"C = {config.channels}, H = {config.heads}, p = {config.batch_size}")
    write_picture(path, figure)
