"""Columns: `torch.compile`, `torch.export` and tracers, in a process without the run-time checks of the tests.

As a program: reads cells as JSON, and prints a line for each: "yes", or "error: what it says", or "wrong: what is".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from derivatives import leaves
from shapes import COLUMNS_OF_TRACERS
from subjects import N, Others, Subject, subjects
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from randbatch.models import GraphTransformer

Run = Callable[..., Any]
_TORCHS = ("Guard failed", "lift_tracked_freevar")  # an exported program refuses its input; torch's compiler asserts
SIZES = (70, 71, 75, 80, 64, 90, 100, 57, 77, 66)


class Row(nn.Module):
    """A row with nothing but its inputs to give."""

    def __init__(self, subject: Subject, training: bool) -> None:
        super().__init__()
        self.module = subject.module().train(training)
        self.training = training
        self._call = subject.call

    def forward(self, inputs: list[Tensor], others: Others) -> Tensor:
        return self._call(self.module, inputs, others)


def others_of(subject: Subject, row: Row, n: int) -> Others:
    """Graphs, masks and edges; torch.compile takes no sparse matrix, so those of a model are prepared as it says."""
    others = subject.others(n)
    if not isinstance(row.module, GraphTransformer):
        return others
    return (row.module.prepare_edges(others[0][0], n, sparse=False),), {}


def run(function: Run, row: Row, inputs: list[Tensor], others: Others) -> list[Tensor]:
    torch.manual_seed(5)
    out = function(inputs, others)
    found = torch.autograd.grad(out.sin().sum(), leaves(row, inputs), allow_unused=True, materialize_grads=True)
    return [out.detach(), *found]


def same(found: list[Tensor], want: list[Tensor]) -> None:
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@lru_cache(1)
def in_training(subject: Subject) -> tuple[Row, Run, CompileCounterWithBackend]:
    """Compiled once for all columns that are in training."""
    counter = CompileCounterWithBackend("aot_eager")
    row = Row(subject, True)
    return row, torch.compile(row, backend=counter, fullgraph=True), counter


def new_tensors(subject: Subject) -> None:
    """`fullgraph=True` in training, ten new tensors of one shape: compiled once."""
    row, function, counter = in_training(subject)
    others = others_of(subject, row, N)
    for number in range(10):
        inputs = subject.inputs(seed=30 + number)
        same(run(function, row, inputs, others), run(row, row, inputs, others))
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times"


def sizes(subject: Subject) -> None:
    """`dynamic=True`, ten numbers of tokens, in eval: compiled at most four times."""
    counter = CompileCounterWithBackend("aot_eager")
    row = Row(subject, False)
    function: Run = torch.compile(row, backend=counter, fullgraph=True, dynamic=True)
    for n in SIZES:
        inputs, others = subject.inputs(n), others_of(subject, row, n)
        same(run(function, row, inputs, others), run(row, row, inputs, others))
    assert counter.frame_count <= 4, f"compiled {counter.frame_count} times for {len(SIZES)} sizes"


def sizes_of_tokens(subject: Subject) -> None:
    """As `sizes`, with the dimension of tokens alone marked as dynamic."""
    counter = CompileCounterWithBackend("aot_eager")
    row = Row(subject, False)
    function: Run = torch.compile(row, backend=counter, fullgraph=True)
    for n in SIZES:
        inputs, others = subject.inputs(n), others_of(subject, row, n)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
        same(run(function, row, inputs, others), run(row, row, inputs, others))
    assert counter.frame_count <= 4, f"compiled {counter.frame_count} times for {len(SIZES)} sizes"


def second(subject: Subject) -> None:
    """A second derivative of a compiled module."""
    row, function, _ = in_training(subject)
    inputs, others = subject.inputs(), others_of(subject, row, N)

    def of(called: Run) -> list[Tensor]:
        torch.manual_seed(5)
        (first,) = torch.autograd.grad(called(inputs, others).sin().sum(), inputs[:1], create_graph=True)
        return [*torch.autograd.grad(first.square().sum(), inputs[:1])]

    same(of(function), of(row))


def _exported(dynamic: bool) -> Callable[[Subject], None]:
    def column(subject: Subject) -> None:
        row, inputs = Row(subject, False), [x.detach() for x in subject.inputs()]
        others = others_of(subject, row, N)
        auto = torch.export.Dim.AUTO
        shapes = _by_size(inputs, auto), (_by_size(others[0], auto), _by_size(others[1], auto))
        program = torch.export.export(row, (inputs, others), dynamic_shapes=shapes if dynamic else None).module()
        with torch.no_grad():
            for n in (70, 91) if dynamic else (N,):
                for seed in (1, 2):
                    given, beside = [x.detach() for x in subject.inputs(n, seed=seed)], others_of(subject, row, n)
                    torch.manual_seed(5)
                    want = row(given, beside)
                    torch.manual_seed(5)
                    torch.testing.assert_close(program(given, beside), want, rtol=1e-4, atol=1e-4)

    return column


def _by_size(given: Any, dim: Any) -> Any:
    """Which dimensions of tensors go with the number of tokens, or of edges."""
    if isinstance(given, Tensor):
        return {d: dim for d, size in enumerate(given.shape) if size >= N}
    if isinstance(given, dict):
        return {key: _by_size(x, dim) for key, x in given.items()}
    return type(given)(_by_size(x, dim) for x in given) if isinstance(given, (tuple, list)) else None


COLUMNS: dict[str, Callable[[Subject], None]] = {
    "compile": new_tensors,
    "compile, second derivative": second,
    "export": _exported(False),
}
COLUMNS_OF_SIZES: dict[str, Callable[[Subject], None]] = {
    "compile, dynamic": sizes,
    "export, dynamic N": _exported(True),
}
COLUMNS_OF_ADVICE: dict[str, Callable[[Subject], None]] = {"mark_dynamic": sizes_of_tokens}


COLUMNS_OF_ALL = COLUMNS | COLUMNS_OF_SIZES | COLUMNS_OF_TRACERS | COLUMNS_OF_ADVICE


def in_one_process(cells: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What these cells do in a process of their own."""
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(cells), check=True, capture_output=True, text=True
    )
    lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return {(key, name): status for key, name, status, _ in lines}


def main(cells: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    before = None
    for key, name in cells:
        subject = subjects()[key]
        if subject.why_not_here() is not None:
            continue
        if key != before:
            torch._dynamo.reset()
        before = key
        begin = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                COLUMNS_OF_ALL[name](subject)
            status = "yes"
        except AssertionError as error:
            torchs = str(error).startswith(_TORCHS)
            status = f"{'error: AssertionError' if torchs else 'wrong'}: {error}"
        except Exception as error:
            status = f"error: {type(error).__name__}: {error}"
        print(json.dumps([key, name, status, time.process_time() - begin]), flush=True)


if __name__ == "__main__":
    main(json.load(sys.stdin))
