"""Time and peak memory of the layer's forward and backward against N: both must be linear.

Run `python benchmarks/linear_cost.py`. Every case runs in a process of its own; sizes are interleaved.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from _measure import in_a_process, peak_bytes, write_row
from torch import nn

from randbatch.nn import RandomBatchAttention

CHANNELS, HEADS, BATCH_SIZE = 64, 4, 128


def check() -> None:
    """Nothing is timed before it is checked: in one batch the layer is torch's attention."""
    ours = RandomBatchAttention(CHANNELS, HEADS, BATCH_SIZE)
    torchs = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(BATCH_SIZE, CHANNELS)
    torch.testing.assert_close(ours(x), torchs(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-5)


def case(num_tokens: int, steps: int) -> dict[str, float]:
    """One process: median seconds of a step, and the peak above the process before the layer was made."""
    check()
    layer = RandomBatchAttention(CHANNELS, HEADS, BATCH_SIZE)
    before = peak_bytes()
    x = torch.randn(num_tokens, CHANNELS, requires_grad=True)
    seconds = []
    for _ in range(steps + 1):
        x.grad = None
        start = time.perf_counter()
        layer(x).sum().backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "bytes": peak_bytes() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log2-tokens", type=int, nargs="+", default=[17, 18, 19, 20])
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each process")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each size")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(options.case, options.steps)))
        return
    found: dict[int, list[dict[str, float]]] = {2**power: [] for power in options.log2_tokens}
    for _ in range(options.repeats):
        for num_tokens, rows in found.items():
            rows.append(in_a_process(sys.argv[0], "--case", num_tokens, "--steps", options.steps))
    medians = {n: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for n, rows in found.items()}
    small, large = min(medians), max(medians)
    print("| N | s / step | ns / token | peak MB | bytes / token |\n|---|---|---|---|---|")
    for n, row in medians.items():
        per_token = f"{row['seconds'] / n * 1e9:.0f} | {row['bytes'] / 1e6:.0f} | {row['bytes'] / n:.0f}"
        print(f"| {n} | {row['seconds']:.3f} | {per_token} |")
    ratio = {key: medians[large][key] / medians[small][key] for key in ("seconds", "bytes")}
    print(f"N × {large // small}: time × {ratio['seconds']:.2f}, memory × {ratio['bytes']:.2f}")
    settings = {"channels": CHANNELS, "heads": HEADS, "batch_size": BATCH_SIZE, "dtype": "float32"}
    write_row("linear_cost", {"settings": settings, "medians": medians, "ratio": ratio})


if __name__ == "__main__":
    main()
