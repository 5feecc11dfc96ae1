"""Full-graph training steps of a graph transformer on a generated graph, by default 10^6 nodes and 10^7 edges.

Run `python benchmarks/million_nodes.py`. It prints the time of each step and the peak memory of the process.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from _measure import peak_bytes, write_row

from randbatch.models import GraphTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--edges", type=int, default=10_000_000, help="directed edges")
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--local", default="sage")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(options.nodes, options.features)
    y = torch.randint(10, (options.nodes,))
    edge_index = torch.randint(options.nodes, (2, options.edges))
    model = GraphTransformer(
        options.features,
        10,
        channels=options.hidden,
        layers=options.layers,
        local=options.local,
        batch_size=options.batch_size,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = time.perf_counter()
    edges = model.prepare_edges(edge_index, options.nodes)
    del edge_index
    print(f"edges prepared in {time.perf_counter() - start:.1f} s")
    seconds, losses = [], []
    for step in range(options.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        value = F.cross_entropy(model(x, edges), y)
        value.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(value.item())
        print(
            f"step {step + 1}: loss {losses[-1]:.4f}, {seconds[-1]:.1f} s, peak {peak_bytes() / 1e9:.2f} GB", flush=True
        )
    row = {"settings": vars(options), "seconds": statistics.median(seconds), "peak_bytes": peak_bytes(), "loss": losses}
    write_row("million_nodes", row)


if __name__ == "__main__":
    main()
