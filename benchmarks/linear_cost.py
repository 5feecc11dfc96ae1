"""Time and peak memory of the layer's forward and backward against N: both must be linear.

Run `python benchmarks/linear_cost.py`. Every case runs in a process of its own; sizes are interleaved, each with pages
of 4 kB, which are the default, and with huge pages (`THP_MEM_ALLOC_ENABLE=1`). A machine is not as fast in one minute
as in the next: the time of a token is also compared with that of N = 2^17 just before and after, in the same process.
Memory is the peak above that of a step of 4096 tokens: libraries, threads and their scratch are there whatever N is.
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
CONTROL = 2**17
PAGES = {"small": "0", "huge": "1"}  # to what THP_MEM_ALLOC_ENABLE is set


def check() -> None:
    """Nothing is timed before it is checked: in one batch the layer is torch's attention."""
    ours = RandomBatchAttention(CHANNELS, HEADS, BATCH_SIZE)
    torchs = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(BATCH_SIZE, CHANNELS)
    torch.testing.assert_close(ours(x), torchs(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-5)


def step(layer: nn.Module, x: torch.Tensor) -> float:
    x.grad = None
    start = time.perf_counter()
    layer(x).sum().backward()
    return time.perf_counter() - start


def case(num_tokens: int, steps: int) -> dict[str, float]:
    """One process: the peak of two steps, then steps in turns with steps of `CONTROL` tokens."""
    check()
    layer = RandomBatchAttention(CHANNELS, HEADS, BATCH_SIZE)
    start = peak_bytes()
    step(layer, torch.randn(4096, CHANNELS, requires_grad=True))
    before = peak_bytes()
    x = torch.randn(num_tokens, CHANNELS, requires_grad=True)
    for _ in range(2):
        step(layer, x)
    peak = peak_bytes()
    few = torch.randn(CONTROL, CHANNELS, requires_grad=True)
    step(layer, few)
    seconds, ratios = [], []
    for _ in range(steps):
        beside = [step(layer, few) for _ in range(4)]
        seconds.append(step(layer, x))
        beside += [step(layer, few) for _ in range(4)]
        ratios.append(seconds[-1] / num_tokens / (statistics.median(beside) / CONTROL))
    return {
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "bytes": peak - before,
        "fixed_bytes": before - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log2-tokens", type=int, nargs="+", default=[17, 18, 19, 20, 21, 22])
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each process")
    parser.add_argument("--repeats", type=int, default=2, help="processes for each size")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(options.case, options.steps)))
        return
    sizes = [2**power for power in options.log2_tokens]
    found: dict[tuple[str, int], list[dict[str, float]]] = {(pages, n): [] for n in sizes for pages in PAGES}
    for _ in range(options.repeats):
        for (pages, n), rows in found.items():
            environment = {"THP_MEM_ALLOC_ENABLE": PAGES[pages]}
            rows.append(in_a_process(sys.argv[0], "--case", n, "--steps", options.steps, **environment))
    for pages in PAGES:
        report(pages, {n: found[pages, n] for n in sizes})


def report(pages: str, found: dict[int, list[dict[str, float]]]) -> None:
    medians = {n: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for n, rows in found.items()}
    print(f"{pages} pages\n| N | s / step | µs / token | × N = {CONTROL} | peak MB | bytes / token |")
    print("|---|---|---|---|---|---|")
    for n, row in medians.items():
        time_per_token = f"{row['seconds']:.3f} | {row['seconds'] / n * 1e6:.2f} | {row['ratio']:.2f}"
        print(f"| {n} | {time_per_token} | {row['bytes'] / 1e6:.0f} | {row['bytes'] / n:.0f} |")
    settings = {"channels": CHANNELS, "heads": HEADS, "batch_size": BATCH_SIZE, "dtype": "float32", "pages": pages}
    write_row("linear_cost", {"settings": settings, "medians": medians, "cases": found})


if __name__ == "__main__":
    main()
