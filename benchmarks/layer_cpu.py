"""A layer's forward and backward on a CPU, beside the naive composition, PyG's Performer and the rate of a GEMM.

Run `python benchmarks/layer_cpu.py`. All cases take turns in one process; the table has medians and, in brackets, the
fastest and the slowest. The naive composition projects, gathers query, key and value by `index_select`, attends by
`scaled_dot_product_attention`, puts back by `index_copy` and projects; the same code draws its partition. The GEMM is
that of the layer's QKV projection, in the same turns: the last column is how much of its rate the layer's products
reach (projections and in-batch attention, five products of attention in backward for two in forward).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _measure import write_row
from torch import Tensor, nn
from torch_geometric.nn.attention import PerformerAttention

from randbatch import full_attention, random_partition
from randbatch.experiments.peers import naive
from randbatch.nn import RandomBatchAttention


def check(channels: int, heads: int, batch_size: int) -> None:
    """Nothing is timed before it is checked against the formula, batch by batch, gradients too."""
    layer = RandomBatchAttention(channels, heads, batch_size).eval()
    x = torch.randn(3 * batch_size, channels, requires_grad=True)
    order = random_partition(len(x), batch_size, seed=layer.randbatch_config.seed).order

    def formula(x: Tensor) -> Tensor:
        q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).unflatten(-1, (3, heads, -1)).unbind(1)
        out = torch.zeros_like(q)
        for tokens in order.split(batch_size):
            out = out.index_copy(0, tokens, full_attention(q[tokens], k[tokens], v[tokens]))
        return layer.out_proj(out.flatten(1))

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = function(x)
        return [out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])]

    want = run(formula)
    torch.testing.assert_close(run(layer), want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run(lambda x: naive(layer, x, order)), want, rtol=1e-3, atol=1e-4)
    layer.randbatch_config.chunk_batches = 2
    torch.testing.assert_close(run(layer), want, rtol=1e-3, atol=1e-4)


def step(module: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[float, float]:
    """Seconds by the clock, and of all threads."""
    start, used = time.perf_counter(), time.process_time()
    module(x).backward(grad)
    return time.perf_counter() - start, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=131_072, help="N, a multiple of p")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for channels in options.channels:
        measure(channels, options)


def measure(channels: int, options: argparse.Namespace) -> None:
    num_tokens, heads, size = options.tokens, options.heads, options.batch_size
    check(channels, heads, size)
    layer = RandomBatchAttention(channels, heads, size)
    pieces = RandomBatchAttention(channels, heads, size, chunk_batches="auto")
    performer = PerformerAttention(channels, heads, head_channels=channels // heads)
    modules: list[nn.Module] = [layer, pieces, performer]
    x = torch.randn(num_tokens, channels, requires_grad=True)
    grad = torch.randn(num_tokens, channels)
    cases: dict[str, Callable[[Tensor], Tensor]] = {
        "layer": layer,
        "layer, chunk_batches=auto": pieces,
        "naive composition": lambda x: naive(layer, x),
        "PyG PerformerAttention": lambda x: performer(x.unsqueeze(0)).squeeze(0),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in [*cases, "GEMM"]}
    for _ in range(options.turns + 1):  # the first is not counted
        for name, case in cases.items():
            x.grad = None
            for module in modules:
                module.zero_grad()
            found[name].append(step(case, x, grad))
        start, used = time.perf_counter(), time.process_time()
        with torch.no_grad():
            F.linear(x, layer.in_proj_weight)
        found["GEMM"].append((time.perf_counter() - start, time.process_time() - used))
    rate = 6 * num_tokens * channels**2 / statistics.median(row[0] for row in found["GEMM"][1:])
    work = 3 * 8 * num_tokens * channels**2 + (2 + 5) * 2 * num_tokens * size * channels
    shape = f"N = {num_tokens}, C = {channels}, H = {heads}, p = {size}, {options.threads} threads"
    print(f"{shape}; GEMM {rate / 1e9:.0f} GF/s")
    print("| case | ms | of all threads | × layer | of the GEMM's rate |\n|---|---|---|---|---|")
    base = statistics.median(row[0] for row in found["layer"][1:])
    rows = {}
    for name in cases:
        wall, cpu = (sorted(times) for times in zip(*found[name][1:], strict=True))
        middle = statistics.median(wall)
        share = "" if "Performer" in name else f"{work / middle / rate:.0%}"
        spread = f"{middle * 1e3:.0f} ({wall[0] * 1e3:.0f} to {wall[-1] * 1e3:.0f})"
        print(f"| {name} | {spread} | {statistics.median(cpu) * 1e3:.0f} | {middle / base:.2f} | {share} |")
        rows[name] = {"seconds": wall, "cpu_seconds": cpu}
    write_row("layer_cpu", {"settings": vars(options) | {"channels": channels}, "gemm_rate": rate, "cases": rows})


if __name__ == "__main__":
    main()
