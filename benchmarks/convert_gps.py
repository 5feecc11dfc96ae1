"""A model of torch_geometric's own `GPSConv` on a generated graph, as it comes against converted: time and peak memory.

Run `python benchmarks/convert_gps.py`; it draws `docs/convert_gps.png`. Every case runs in a process of its own. The
unconverted model is followed until a step takes over a minute or it no longer fits the memory limit.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import torch
from _measure import in_a_process, peak_bytes, write_row
from torch import Tensor, nn
from torch_geometric.nn import GPSConv, SAGEConv

import randbatch as rb

matplotlib.use("agg")
import matplotlib.pyplot as plt

CHANNELS, HEADS, LAYERS, DEGREE, BATCH_SIZE = 64, 4, 2, 5, 128
LIMIT_GB, LIMIT_S = 24, 60.0
PICTURE = Path(__file__).parent.parent / "docs" / "convert_gps.png"


class GPS(nn.Module):
    """Layers of `GPSConv` as torch_geometric has them: SAGE beside multi-head attention, batch norms, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        convs = (GPSConv(CHANNELS, SAGEConv(CHANNELS, CHANNELS), heads=HEADS) for _ in range(LAYERS))
        self.layers = nn.ModuleList(convs)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """The nodes `[N, C]` after all layers."""
        for layer in self.layers:
            x = layer(x, adjacency)
        return x


def make_graph(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Features and a random graph of `DEGREE` edges into every node, as the CSR matrix that is fastest here."""
    columns = torch.randint(0, num_nodes, (num_nodes * DEGREE,))
    rows = torch.arange(0, num_nodes * DEGREE + 1, DEGREE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that CSR is in beta
        size = (num_nodes, num_nodes)
        adjacency = torch.sparse_csr_tensor(rows, columns, torch.ones(len(columns)), size, check_invariants=False)
    return torch.randn(num_nodes, CHANNELS), adjacency


def check() -> None:
    """Nothing is timed before it is checked: in one batch the converted model is the model."""
    torch.manual_seed(0)
    model, (x, adjacency) = GPS().eval(), make_graph(500)
    want = model(x, adjacency)
    rb.convert(model, 500)
    torch.testing.assert_close(model(x, adjacency), want, rtol=1e-4, atol=1e-5)


def case(num_nodes: int, converted: bool, steps: int) -> dict[str, float]:
    """One process: median seconds of a training step, and the peak above the process before the model was made."""
    check()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GB * 10**9, LIMIT_GB * 10**9))
    before = peak_bytes()
    model, (x, adjacency) = GPS(), make_graph(num_nodes)
    if converted:
        rb.convert(model, BATCH_SIZE)
    seconds: list[float] = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model.zero_grad()
        model(x, adjacency).square().mean().backward()
        seconds.append(time.perf_counter() - start)
        if seconds[-1] > LIMIT_S:
            break  # slow enough to know: no further step
    return {"seconds": statistics.median(seconds[1:] or seconds), "bytes": peak_bytes() - before}


def measure(sizes: list[int], steps: int, repeats: int) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Both models at every size, one after the other, in rounds."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {"unconverted": {}, "converted": {}}
    beyond = max(sizes) + 1
    for _ in range(repeats):
        for num_nodes in sizes:
            for kind, rows in found.items():
                if kind == "unconverted" and num_nodes >= beyond:
                    continue
                options = ["--case", num_nodes, "--steps", steps, *(["--converted"] if kind == "converted" else [])]
                try:
                    row = in_a_process(sys.argv[0], *options)
                except subprocess.CalledProcessError as error:
                    print(f"{kind}, {num_nodes} nodes: {error.stderr.strip().splitlines()[-1]}")
                    beyond = num_nodes
                    continue
                rows.setdefault(num_nodes, []).append(row)
                print(f"{kind}, {num_nodes} nodes: {row['seconds']:.2f} s, {row['bytes'] / 1e9:.2f} GB", flush=True)
                if kind == "unconverted" and row["seconds"] > LIMIT_S:
                    beyond = num_nodes  # once is enough
    return found


def draw(medians: dict[str, dict[int, dict[str, float]]]) -> None:
    """Time and memory against N on logarithmic axes."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, key, scale, label in zip(
        axes, ("seconds", "bytes"), (1, 1e9), ("seconds per training step", "peak memory, GB"), strict=True
    ):
        for (kind, rows), color, marker in zip(medians.items(), ("#7f7f7f", "#d62728"), ("s", "o"), strict=True):
            name = "GPSConv" if kind == "unconverted" else f"GPSConv, converted (p = {BATCH_SIZE})"
            panel.loglog(
                list(rows), [row[key] / scale for row in rows.values()], color=color, marker=marker, label=name
            )
        panel.set(xlabel="nodes", ylabel=label)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(LIMIT_S, color="black", linewidth=0.8, linestyle=":")
    axes[0].text(1e4, LIMIT_S * 1.15, "a minute", fontsize=8)
    axes[0].legend(fontsize=9, frameon=False, loc="lower right")
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each process")
    parser.add_argument("--repeats", type=int, default=2, help="processes for each case")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--converted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(options.case, options.converted, options.steps)))
        return
    found = measure(sorted(options.nodes), options.steps, options.repeats)
    medians: dict[str, dict[int, dict[str, Any]]] = {
        kind: {n: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for n, rows in sizes.items()}
        for kind, sizes in found.items()
    }
    print("| nodes | s / step | converted | peak GB | converted |\n|---|---|---|---|---|")
    for n, ours in medians["converted"].items():
        theirs = medians["unconverted"].get(n)
        time_cell, memory_cell = (
            ("", "") if theirs is None else (f"{theirs['seconds']:.2f}", f"{theirs['bytes'] / 1e9:.2f}")
        )
        print(f"| {n} | {time_cell} | {ours['seconds']:.2f} | {memory_cell} | {ours['bytes'] / 1e9:.2f} |")
    settings = {
        "channels": CHANNELS, "heads": HEADS, "layers": LAYERS, "degree": DEGREE, "batch_size": BATCH_SIZE,
        "dtype": "float32", "steps": options.steps, "repeats": options.repeats,
    }  # fmt: skip
    write_row("convert_gps", {"settings": settings, "medians": medians})
    draw(medians)
    print(PICTURE.relative_to(Path.cwd()) if PICTURE.is_relative_to(Path.cwd()) else PICTURE)


if __name__ == "__main__":
    main()
