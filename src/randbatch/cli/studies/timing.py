"""Time and memory of a training step of attention layers, their table and picture.

Nothing is timed before it is checked.

Shape letters: N tokens, C channels, H heads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._errors import InvalidValue
from randbatch._files import parse_json, read_text, write_picture
from randbatch._optional import new_figure
from randbatch.analysis.plan import peak_allocated
from randbatch.cli.studies.peers import PEERS

__all__ = ["Layer", "check_peers", "draw_rows", "measure_rows", "read_rows", "table_of"]

_ROW = ("case", "tokens", "seconds", "median", "peak_bytes")
_REFERENCE = "layer"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """The size of the layers that are compared."""

    channels: int
    heads: int
    batch_size: int

    def make(self, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """The modules of a peer, and its function."""
        return PEERS[name].make(self.channels, self.heads, self.batch_size)


def check_peers(layer: Layer, names: Sequence[str], device: torch.device) -> None:
    """Check that peers which compute the same attention agree in one batch of all tokens, outputs and gradients.

    Raises:
        AssertionError: one does not; the message names it.
        MissingExtra: the package of a peer is not installed.
    """
    for name in names:
        layer.make(name)  # a missing package shows now
    x = torch.randn(layer.batch_size, layer.channels, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    found: dict[str, tuple[Tensor, ...]] = {}
    weights: dict[str, Any] | None = None
    for name in dict.fromkeys([_REFERENCE, *(name for name in names if PEERS[name].same)]):
        module, function = layer.make(name)
        module.to(device)
        if weights is None:
            weights = module.state_dict()
        module.load_state_dict(weights)
        out = function(x)
        found[name] = (out, *torch.autograd.grad(out, [x, *module.parameters()], grad))
    for name, tensors in found.items():
        for tensor, expected in zip(tensors, found[_REFERENCE], strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


def measure_rows(
    layer: Layer, names: Sequence[str], size: int, turns: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each peer at one N: seconds of every turn, and the peak of the allocator above parameters and input."""
    x = torch.randn(size, layer.channels, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    made = {name: layer.make(name) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    for turn in range(turns + 1):
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier call; an `InvalidValue` names a line that is none of them."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else [], 1):
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict) or not set(_ROW) <= row.keys() or row["case"] not in PEERS:
            raise InvalidValue(f"{path}, line {number} is not a row of randbatch bench")
        rows.append(row)
    return rows


def table_of(rows: Sequence[Row]) -> str:
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


def draw_rows(layer: Layer, names: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Time and peak against N, a line for each peer."""
    figure, (left, right) = new_figure(1, 2, figsize=(10, 4.2))
    for name in names:
        own = [row for row in rows if row["case"] == name]
        sizes = [row["tokens"] for row in own]
        style = {"marker": "o", "markersize": 4, "label": name, "linewidth": 2 if name == _REFERENCE else 1.2}
        left.plot(sizes, [row["median"] for row in own], **style)
        right.plot(sizes, [row["peak_bytes"] / 1e6 for row in own], **style)
    for axes, label in ((left, "seconds, forward and backward"), (right, "peak MB above parameters and input")):
        axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(f"C = {layer.channels}, H = {layer.heads}, p = {layer.batch_size}")
    write_picture(path, figure)
