"""The op against what the machine allows: every backend, forward and backward, beside floors of memory and products.

Run `python benchmarks/kernel_floors.py` on a GPU, after `verify_triton.py`. The rates of a device copy and of a matrix
product are measured in the same run. The floor of forward is the larger of moving 4 tensors and 4 N p C operations, of
backward 8 tensors and 10 N p C: less cannot be moved or multiplied.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from _measure import write_row
from torch import Tensor

import randbatch as rb

_FLEX_BLOCK = 128  # tokens in a block of flex_attention's mask
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def seconds(function: Callable[[], object], device: torch.device, turns: int) -> float:
    """Median of several turns after two that warm up."""
    times: list[float] = []
    for _ in range(turns + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def rates(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), operations a second of a matrix product."""
    x = torch.randn(options.tokens * options.heads * options.head_size, device=device, dtype=dtype)
    out = torch.empty_like(x)
    copied = 2 * x.numel() * x.element_size() / seconds(lambda: out.copy_(x), device, options.turns)
    a = torch.randn(options.matrix, options.matrix, device=device, dtype=dtype)
    return copied, 2 * options.matrix**3 / seconds(lambda: a @ a, device, options.turns)


def varlen(query: Tensor, key: Tensor, value: Tensor, size: int, order: Tensor) -> Tensor:
    """`torch.nn.attention.varlen` between gathers; N must be a multiple of p."""
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10, CUDA alone

    starts = torch.arange(0, len(query) + 1, size, device=query.device, dtype=torch.int32)
    packed = (x.index_select(0, order) for x in (query, key, value))
    out = varlen_attn(*packed, starts, starts, size, size)
    return torch.zeros_like(out).index_copy(0, order, out)


def flex(size: int, order: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`flex_attention`, compiled, with a mask of blocks, between gathers; 128 divides p or p divides it."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    together = max(size // _FLEX_BLOCK, 1)  # blocks that a batch takes
    blocks = torch.arange(-(-len(order) // _FLEX_BLOCK), device=order.device, dtype=torch.int32)
    columns = torch.zeros(len(blocks), len(blocks), device=order.device, dtype=torch.int32)  # as wide as all keys
    columns[:, :together] = blocks.unsqueeze(1) // together * together + torch.arange(together, device=order.device)
    mask = BlockMask.from_kv_blocks(
        torch.full_like(blocks, together).expand(1, 1, -1),
        columns.expand(1, 1, -1, -1),
        BLOCK_SIZE=_FLEX_BLOCK,
        seq_lengths=(len(order), len(order)),
        mask_mod=lambda _, head, query, key: query // size == key // size,
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        packed = (x.index_select(0, order).transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out = compiled(*packed, block_mask=mask).squeeze(0).transpose(0, 1)
        return torch.zeros_like(out).index_copy(0, order, out)

    return attend


def unfused(query: Tensor, key: Tensor, value: Tensor, size: int, order: Tensor) -> Tensor:
    """Three gathers, `scaled_dot_product_attention`, a scatter; N must be a multiple of p."""
    packed = (x.index_select(0, order).unflatten(0, (-1, size)).transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(*packed).transpose(1, 2).flatten(0, 1)
    return torch.zeros_like(out).index_copy(0, order, out)


def measure(size: int, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Milliseconds of every way at one p."""
    num_tokens = options.tokens // size * size
    shape = (num_tokens, options.heads, options.head_size)
    qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, device=device, dtype=dtype)
    part = rb.random_partition(num_tokens, size, seed=1, device=device)
    ways: dict[str, Callable[[], Tensor]] = {
        name: lambda name=name: rb.random_batch_attention(*qkv, batch_size=size, partition=part, backend=name)
        for name in options.backends
    }
    ways["unfused"] = lambda: unfused(*qkv, size, part.order)
    if device.type == "cuda":
        ways["varlen"] = lambda: varlen(*qkv, size, part.order)
        by_blocks = flex(size, part.order)
        ways["flex_attention"] = lambda: by_blocks(*qkv)
    expected = rb.random_batch_attention(
        *(x.detach().float() for x in qkv), batch_size=size, partition=part, backend="sdpa"
    )
    found: dict[str, object] = {}
    for name, way in ways.items():
        try:
            with torch.no_grad():
                off = float((way().float() - expected).norm() / expected.norm())
        except (ImportError, RuntimeError) as error:  # a peer that this version or device does not have
            if name in options.backends:
                raise
            found[name] = f"not here: {str(error).splitlines()[0][:60]}"
            continue
        assert off < 2e-2, f"{name} at p = {size} is off by {off:.3g}: not timed"

        def both(way: Callable[[], Tensor] = way) -> None:
            for x in qkv:
                x.grad = None
            way().backward(grad)

        with torch.no_grad():
            forward = seconds(way, device, options.turns)
        found[name] = {"forward_ms": 1e3 * forward, "both_ms": 1e3 * seconds(both, device, options.turns), "error": off}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10**6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--backends", nargs="+", default=["triton", "sdpa"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--matrix", type=int, default=8192)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    copied, multiplied = rates(options, device, dtype)
    print(f"copy {copied / 1e12:.2f} TB/s, product {multiplied / 1e12:.1f} TFLOP/s")
    print("| p | way | forward ms | × floor | forward + backward ms | × floor |\n|---|---|---|---|---|---|")
    channels = options.heads * options.head_size
    tensor = options.tokens * channels * torch.empty((), dtype=dtype).element_size()
    for size in options.batch_sizes:
        work = options.tokens * size * channels
        forward = max(4 * tensor / copied, 4 * work / multiplied)
        both = forward + max(8 * tensor / copied, 10 * work / multiplied)
        found = measure(size, options, device, dtype)
        for name, row in found.items():
            if isinstance(row, dict):
                ratios = row["forward_ms"] / forward / 1e3, row["both_ms"] / both / 1e3
                cells = f"{row['forward_ms']:.3f} | {ratios[0]:.2f} | {row['both_ms']:.3f} | {ratios[1]:.2f}"
            else:
                cells = f"{row} | | |"
            print(f"| {size} | {name} | {cells} |", flush=True)
        settings = vars(options) | {"batch_size": size, "hardware": _hardware(device)}
        floors = {"forward_ms": 1e3 * forward, "both_ms": 1e3 * both, "copy": copied, "product": multiplied}
        write_row("kernel_floors", {"settings": settings, "floor": floors, "found": found})


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
