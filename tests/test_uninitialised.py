"""What the tests rely on: memory that nobody has written to is NaN, one thread computes, compilers see torch's own."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
INTEGERS = [torch.uint8, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_nothing_is_there_by_luck(dtype: torch.dtype) -> None:
    like = torch.zeros(2, 3, dtype=dtype)
    made = [
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
        like.new_empty(2, 3),
        like.new_empty_strided((2, 3), (1, 2)),
    ]
    for x in made:
        assert x.shape == (2, 3)
        assert x.dtype == dtype
        assert x.isnan().all() if dtype in FLOATS else (x == torch.iinfo(dtype).max).all()


def test_other_tensors_are_left_alone() -> None:
    leaf = torch.empty(3, requires_grad=True)
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert torch.empty(3, device="meta").is_meta
    assert torch.empty(3, dtype=torch.bool).dtype == torch.bool
    assert torch.nn.Linear(3, 2).weight.isfinite().all()  # what torch itself makes and fills
    with FakeTensorMode():
        assert type(torch.empty(3)).__name__ == "FakeTensor"
    assert torch.func.vmap(lambda x: x + x.new_empty(()).fill_(1.0))(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_tracers_record_nothing_more() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x) + 1

    graph = make_fx(function)(torch.zeros(3)).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert names == ["aten.empty_like.default", "aten.copy_.default", "aten.add.Tensor"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


def test_one_thread_computes() -> None:
    """Here, and in the processes that tests start."""
    assert torch.get_num_threads() == 1
    code = "import torch; print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "1"
