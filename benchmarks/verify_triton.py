"""Check the Triton backend on this machine's GPU against float64: values, gradients, the same bits every time.

`python benchmarks/verify_triton.py` prints a row for every case: the errors of output and of the gradients of query,
key and value, in units of those of plain torch in the same dtype. At most 2 is right. It ends with 1 where a case
fails, and with 2 where there is no CUDA device. `--interpret` runs a few small cases on the CPU instead, to test this
script.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import randbatch as rb
from randbatch.kernels import BACKENDS, Problem

SEED = 11
DROPOUT = 0.25
SIZES = ((8, 8), (16, 16), (32, 32), (64, 64), (100, 36), (128, 128))  # D, Dv: the tiles of each, and a padded one
WIDTHS = (2, 16, 40, 64, 128, 200, 256, 300, 512, 1024, 4096)  # p: whole batches in a tile, and several tiles
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One problem; `option` is "", "shift", "alone" (no own key, with the log-sum-exp), "graphs" or "dropout"."""

    dtype: torch.dtype
    batch_size: int
    size: int
    value_size: int
    option: str = ""
    num_tokens: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype:8} p={self.batch_size:<5} D={self.size:<4} Dv={self.value_size:<4} {self.option:8}"


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for width in WIDTHS:
            for size, value_size in SIZES:
                yield Case(dtype, width, size, value_size, num_tokens=3 * width - 1)
            for option in ("shift", "alone", "graphs"):
                yield Case(dtype, width, 64, 64, option, num_tokens=3 * width - 1)
        for width in (16, 64, 100):
            for size in (16, 64, 128):
                yield Case(dtype, width, size, 100, "dropout", num_tokens=100)  # values are unit vectors


def small_cases() -> Iterator[Case]:
    for option in ("", "shift", "alone", "graphs", "dropout"):
        yield Case(torch.float32, 10, 16, 28, option, num_tokens=28)


def draw(case: Case, device: str) -> tuple[list[Tensor], rb.Partition]:
    torch.manual_seed(SEED)
    shapes = [(case.num_tokens, 3, size) for size in (case.size, case.size, case.value_size)]
    inputs = [torch.randn(shape, dtype=torch.float64).to(device, case.dtype) for shape in shapes]
    batch = torch.randint(0, 5, (case.num_tokens,), device=device).sort().values if case.option == "graphs" else None
    return inputs, rb.random_partition(case.num_tokens, case.batch_size, batch=batch, seed=SEED, device=device)


def shifts_of(case: Case, part: rb.Partition) -> list[Tensor] | None:
    """Of the own logits, one for each batch and head."""
    if case.option != "shift":
        return None
    return [torch.linspace(-6, 1, 3 * rows, device=part.order.device).view(rows, 3) for rows, _ in part.groups]


def by_formula(case: Case, part: rb.Partition, inputs: list[Tensor], factor: Tensor | None) -> list[Tensor]:
    """Output, and log-sum-exp for "alone", in the dtype of the inputs; `factor` `[N, N, H]` is dropout's."""
    outs, norms = [], []
    shifts = shifts_of(case, part)
    blocks = zip(*(part.split(x) for x in (*map(part.pack, inputs), part.order)), strict=True)
    for position, (query, key, value, tokens) in enumerate(blocks):
        logits = torch.einsum("mqhd,mphd->mhqp", query, key) / case.size**0.5
        own = torch.eye(query.shape[1], device=query.device)
        if shifts is not None:
            logits = logits + shifts[position][:, :, None, None].to(logits.dtype) * own.to(logits.dtype)
        if case.option == "alone":
            logits = logits.masked_fill(own.bool(), -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        if factor is not None:
            weights = weights * factor[tokens.unsqueeze(2), tokens.unsqueeze(1)].permute(0, 3, 1, 2).to(weights.dtype)
        outs.append(torch.einsum("mhqp,mphe->mqhe", weights, value))
        norms.append(torch.logsumexp(logits, dim=-1).transpose(1, 2))
    out, lse = part.unpack(part.join(outs)), part.unpack(part.join(norms))
    return [out, lse] if case.option == "alone" else [out]


def by_triton(case: Case, part: rb.Partition, inputs: list[Tensor]) -> list[Tensor]:
    alone = case.option == "alone"
    dropout_p = DROPOUT if case.option == "dropout" else 0.0
    problem = Problem.of(inputs[0], inputs[2], None, dropout_p, need_lse=alone, exclude_self=alone)
    torch.manual_seed(SEED)  # of dropout
    out, lse = BACKENDS["triton"].attend(inputs[0], inputs[1], inputs[2], part, problem, shifts_of(case, part))
    return [out] if lse is None else [out, lse]


def with_gradients(function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What the function gives, and the gradients of a fixed weighted sum of all that."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    results = function(leaves)
    loss = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
    for result in results:
        weight = torch.linspace(-50, 50, result.numel(), device=result.device).sin().view(result.shape)
        loss = loss + (result * weight.to(inputs[0].dtype).to(result.dtype)).sum()
    return [x.detach() for x in (*results, *torch.autograd.grad(loss, leaves))]


def kept(case: Case, part: rb.Partition, inputs: list[Tensor]) -> Tensor:
    """What dropout multiplies weights with, `[N, N, H]`: with unit vectors for values the output is the weights."""
    units = torch.eye(case.num_tokens, device=part.order.device, dtype=case.dtype).unsqueeze(1).expand(-1, 3, -1)
    (weights,) = by_triton(case, part, [*inputs[:2], units])
    return (weights > 0).transpose(1, 2) / (1 - DROPOUT)


def check(case: Case, device: str) -> tuple[list[float], bool]:
    """Error over that of plain torch for output and gradients, and whether two runs give the same bits."""
    inputs, part = draw(case, device)
    if case.option == "alone":  # a token that is alone has no weights to compare
        part = rb.random_partition(case.num_tokens, max(case.batch_size, 3), seed=SEED, device=device)
    factor = kept(case, part, inputs) if case.option == "dropout" else None
    truth = with_gradients(lambda x: by_formula(case, part, x, factor), inputs, torch.float64)
    plain = with_gradients(lambda x: by_formula(case, part, x, factor), inputs, case.dtype)
    runs = [with_gradients(lambda x: by_triton(case, part, x), inputs, case.dtype) for _ in range(3)]
    same = all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))
    ratios = []
    for ours, theirs, exact in zip(runs[0], plain, truth, strict=True):
        floor = 2 * torch.finfo(case.dtype).eps * exact.norm().item()  # where plain torch is exact by luck
        noise = max((theirs.double() - exact).norm().item(), floor, 1e-300)
        ratios.append((ours.double() - exact).norm().item() / noise)
    return ratios, same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="a few small cases on the CPU")
    interpret = parser.parse_args().interpret
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return 2
    device = "cpu" if interpret else "cuda"
    torch.set_float32_matmul_precision("highest")
    name = "interpreted" if interpret else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; errors over those of plain torch: output, [lse,] dq, dk, dv")
    failed = total = 0
    for case in small_cases() if interpret else cases():
        try:
            ratios, same = check(case, device)
            right = all(ratio <= 2 for ratio in ratios) and same  # nan is not
            row = f"{'  '.join(f'{ratio:5.2f}' for ratio in ratios)}{'' if same else '  the bits differ'}"
        except Exception as error:  # one row for each case, whatever happens in it
            right, row = False, f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        total, failed = total + 1, failed + (not right)
        print(f"{case}  {'ok  ' if right else 'FAIL'}  {row}", flush=True)
    print(f"{total - failed} of {total} right")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
