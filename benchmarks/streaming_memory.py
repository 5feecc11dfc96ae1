"""Peak memory of a layer's training step in pieces, above its input, its output and their gradients.

Run `python benchmarks/streaming_memory.py`. Each case is a process of its own. The baseline holds the same four tensors
`[N, C]`, every page of them written, and has run the layer on a few tokens, so that libraries and kernels have their
buffers. Then the two that the step makes itself (output and gradient of the input) are freed, their pages go back to
the system, and the step runs: what the peak resident memory of the process (which never falls) is above
the baseline is what the step needed beside the four.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from _measure import in_a_process, peak_bytes, write_row

from randbatch.nn import RandomBatchAttention

CHANNELS, HEADS, BATCH_SIZE = 64, 4, 128


def make(chunk: str, batch_size: int) -> RandomBatchAttention:
    chunk_batches = None if chunk == "none" else "auto" if chunk == "auto" else int(chunk)
    return RandomBatchAttention(CHANNELS, HEADS, batch_size, chunk_batches=chunk_batches)


def check(chunk: str, batch_size: int) -> None:
    """Nothing is measured before it is checked: pieces compute what all at once computes, gradients too."""
    results = []
    layer = make(chunk, batch_size)
    x = torch.randn(3 * batch_size + 5, CHANNELS, requires_grad=True)
    for chunk_batches in (1, None):
        layer.randbatch_config.chunk_batches = chunk_batches
        torch.manual_seed(0)
        out = layer(x)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def case(num_tokens: int, chunk: str, batch_size: int) -> dict[str, float]:
    check(chunk, batch_size)
    layer = make(chunk, batch_size)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(num_tokens, CHANNELS, requires_grad=True)
    grad = torch.randn(num_tokens, CHANNELS)
    out, of_input = torch.ones(num_tokens, CHANNELS), torch.ones(num_tokens, CHANNELS)
    baseline = peak_bytes()
    del out, of_input
    start = time.perf_counter()
    out = layer(x)
    out.backward(grad)
    return {"seconds": time.perf_counter() - start, "bytes": peak_bytes() - baseline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log2-tokens", type=int, default=20)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--chunks", nargs="+", default=["none", "auto", "16", "64"], help="batches at a time")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each case")
    parser.add_argument("--case", nargs=3, metavar=("LOG2_TOKENS", "CHUNK", "BATCH_SIZE"), help="one, in this process")
    options = parser.parse_args()
    if options.case:
        power, chunk, batch_size = options.case
        print(json.dumps(case(2 ** int(power), chunk, int(batch_size))))
        return
    cases = [(chunk, batch_size) for batch_size in options.batch_sizes for chunk in options.chunks]
    found: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in cases}
    for _ in range(options.repeats):
        for (chunk, batch_size), rows in found.items():
            rows.append(in_a_process(sys.argv[0], "--case", options.log2_tokens, chunk, batch_size))
    print(f"N = 2^{options.log2_tokens}, C = {CHANNELS}, H = {HEADS}, fp32")
    print("| p | batches at a time | MB above input, output and gradients | s / step |\n|---|---|---|---|")
    for (chunk, batch_size), rows in found.items():
        row = {key: statistics.median(each[key] for each in rows) for key in rows[0]}
        print(f"| {batch_size} | {chunk} | {row['bytes'] / 1e6:.1f} | {row['seconds']:.2f} |")
        settings = {"num_tokens": 2**options.log2_tokens, "channels": CHANNELS, "heads": HEADS, "dtype": "float32"}
        settings |= {"batch_size": batch_size, "chunk_batches": chunk, "threads": torch.get_num_threads()}
        write_row("streaming_memory", {"settings": settings, "median": row, "all": rows})


if __name__ == "__main__":
    main()
