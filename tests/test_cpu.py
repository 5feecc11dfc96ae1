"""The compiled CPU backend: against the formula in float64, and what happens where it cannot be compiled."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fusing import FP32, assert_as_good, bias_of, dense, qkv, run
from torch._subclasses import FakeTensorMode

import randbatch as rb
from randbatch.kernels import BACKENDS, Problem
from randbatch.kernels.cpu import build, calls, ops
from randbatch.kernels.fused import Batches
from randbatch.partition.orthogonal import draw_rounds

PROBLEM = Problem(torch.device("cpu"), FP32, 16, 16, 0.25, need_lse=True)
SHAPES = [  # N, p, D, Dv: padded and whole heads, parts of a tile of queries, several blocks of keys
    (9, 2, 16, 16),
    (37, 8, 5, 3),
    (130, 65, 32, 32),
    (99, 50, 128, 128),
    (70, 33, 20, 12),
    (300, 150, 64, 64),
    (600, 600, 16, 48),
    (1100, 1100, 16, 16),
]


@pytest.mark.parametrize(("num_tokens", "batch_size", "size", "value_size"), SHAPES)
def test_error_within_twice_the_formulas_own(num_tokens: int, batch_size: int, size: int, value_size: int) -> None:
    part = rb.random_partition(num_tokens, batch_size, seed=1)
    inputs = qkv(num_tokens, size, value_size, heads=1 if num_tokens > 200 else 2)
    bias = bias_of([part])
    truth = run(lambda *x: dense(*x, bias)[0], inputs, torch.float64)
    plain = run(lambda *x: dense(*x, bias)[0], inputs, FP32)
    mine = run(lambda *x: rb.random_batch_attention(*x, partition=part, backend="cpu"), inputs, FP32)
    assert_as_good(mine, plain, truth)


@pytest.mark.parametrize("estimator", ["plain", "debiased"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_graphs_of_many_sizes(estimator: str, rounds: int) -> None:
    """Own logits that are shifted, left out, merged; a token that is alone."""
    batch = torch.tensor([0, 0, 1, 1, 1, 1, 1, 3, 3, 3, 4]).repeat(3)
    batch[0] = 2
    options = {"batch_size": 6, "batch": batch, "seed": 3, "estimator": estimator, "rounds": rounds}
    drawn = draw_rounds(33, 6, rounds, batch=batch, seed=3)
    parts = [drawn] if isinstance(drawn, rb.Partition) else list(drawn)
    inputs = qkv(33, heads=1)
    bias = bias_of(parts, batch, float(estimator == "debiased"))
    truth = run(lambda *x: dense(*x, bias)[0], inputs, torch.float64)
    mine, plain = (
        run(lambda *x, b=backend: rb.random_batch_attention(*x, **options, backend=b), inputs, FP32)
        for backend in ("cpu", "reference")
    )
    assert_as_good(mine, plain, truth)


def test_strides_of_a_projection_and_no_tokens() -> None:
    query, key, value = torch.randn(50, 3, 2, 16).unbind(1)
    part = rb.random_partition(50, 7, seed=1)
    of_views = rb.random_batch_attention(query, key, value, partition=part, backend="cpu")
    copies = (x.contiguous() for x in (query, key, value))
    assert torch.equal(of_views, rb.random_batch_attention(*copies, partition=part, backend="cpu"))
    none = torch.empty(0, dtype=torch.int64)
    out, lse = ops.OPERATORS.attend(*qkv(0, value_size=5), none, none, none, [], None, None, 1.0, 0.0)
    assert out.shape == (0, 2, 5)
    assert lse.shape == (0, 2)


def test_dropout_does_not_depend_on_where_tokens_stand() -> None:
    """In batch order the same positions have the same fate, whether tokens stand there or are gathered."""
    query, key, _ = (x.detach() for x in qkv(64))
    part = rb.random_partition(64, 16, seed=0)
    kept = []
    for order, used in ((torch.arange(64), part), (part.order, part.packed())):
        torch.manual_seed(5)
        units = torch.eye(64)[order].unsqueeze(1).expand(-1, 2, -1)
        options = {"partition": used, "dropout_p": 0.3, "backend": "cpu"}
        kept.append(rb.random_batch_attention(query[order], key[order], units, **options) > 0)
    assert not kept[0].all()
    assert torch.equal(kept[0][part.order], kept[1])


SPOILT = {
    "nothing": lambda q, k, v, t: None,
    "a query of nan": lambda q, k, v, t: q[t, 0].fill_(torch.nan),
    "a nan in a key": lambda q, k, v, t: k[t, 0, 2:3].fill_(torch.nan),
    "a nan in a value": lambda q, k, v, t: v[t, 0, 1:2].fill_(torch.nan),
    "an infinite key": lambda q, k, v, t: k[t, 0, 2:3].fill_(torch.inf),
    "no logit but -inf": lambda q, k, v, t: (q[t, 0].fill_(-torch.inf), k[:, 0].abs_()),
}


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_not_a_number_stays_where_it_belongs(spoil: str, alone: bool) -> None:
    """Against the formula, batch by batch: output, log-sum-exp and all gradients; own keys left out or not."""
    for width in (*range(1, 21), 70, 150):
        order = torch.randperm(2 * width)
        part = rb.Partition(order, ((2, width),))
        inputs = [torch.randn(2 * width, 2, 5) for _ in range(3)]
        SPOILT[spoil](*inputs, int(order[width // 2]))
        problem = replace(PROBLEM, head_size=5, value_size=5, exclude_self=alone)
        weight = torch.linspace(-1, 1, 20 * width).view(2 * width, 2, 5)
        leaves = [x.requires_grad_() for x in inputs]
        out, lse = BACKENDS["cpu"].attend(*leaves, part, problem, None)
        found = [out, lse, *torch.autograd.grad((out * weight).sum(), leaves)]
        if width == alone:  # a token without keys
            assert all(x.eq(0).all() for x in (*found[:1], *found[2:])) and found[1].isneginf().all()
            continue
        for tokens in order.view(2, width):
            few = [x.detach()[tokens].requires_grad_() for x in inputs]
            own = alone & torch.eye(width, dtype=torch.bool)
            logits = torch.einsum("ihd,jhd->hij", few[0] * problem.scale, few[1]).masked_fill(own, -torch.inf)
            outs = torch.einsum("hij,jhe->ihe", logits.softmax(-1), few[2])
            grads = torch.autograd.grad((outs * weight[tokens]).sum(), few)
            sums = logits.logsumexp(-1).T
            sums = sums.masked_fill(sums == torch.inf, torch.nan)  # unknown to the kernel, as the outputs are
            for mine, right in zip(found, (outs, sums, *grads), strict=True):
                torch.testing.assert_close(mine[tokens], right, rtol=1e-4, atol=1e-5, equal_nan=True)


THREADS = """
import torch, randbatch as rb
torch.manual_seed(0)
for tokens, size in ((2000, 30), (700, 700)):
    inputs = [torch.randn(tokens, 3, 16, requires_grad=True) for _ in range(3)]
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        out = rb.random_batch_attention(*inputs, batch_size=size, seed=1, dropout_p=0.2, backend="cpu")
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
    for more in results[1:]:
        torch.testing.assert_close(more, results[0], rtol=0, atol=0)
print("the same")
"""


def test_the_same_bits_under_any_number_of_threads() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.bfloat16}, "float32"),
        ({"device": torch.device("cuda")}, "CPU"),
        ({"head_size": 257}, "got 257 in query"),
        ({"value_size": 0}, "got 0 in value"),
    ],
)
def test_it_says_why_not(change: dict, reason: str) -> None:
    assert reason in str(BACKENDS["cpu"].why_not(replace(PROBLEM, **change)))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing built, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_told", set())
    monkeypatch.setattr(build, "_given_up", [])
    for function in (build._build, build._version):
        function.cache_clear()
    yield tmp_path / "randbatch"
    for function in (build._build, build._version):
        function.cache_clear()


def test_it_is_compiled_once(fresh: Path) -> None:
    assert ops.library_for(16, 16).why_not() is None
    (made,) = fresh.glob("*.so")
    when = made.stat().st_mtime_ns
    build._build.cache_clear()
    assert ops.library_for(12, 3).why_not() is None
    assert [(path, path.stat().st_mtime_ns) for path in fresh.glob("*.so")] == [(made, when)]
    assert fresh.stat().st_mode & 0o077 == 0


def test_without_a_compiler_it_refuses_and_auto_goes_on(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh.parent))
    x = torch.randn(20, 2, 16)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot be used here: it needs a C\+\+ compiler"):
        rb.random_batch_attention(x, x, x, batch_size=5, backend="cpu")
    of_auto = rb.random_batch_attention(x, x, x, batch_size=5, seed=1)
    assert torch.equal(of_auto, rb.random_batch_attention(x, x, x, batch_size=5, seed=1, backend="sdpa"))
    layer = rb.nn.RandomBatchAttention(32, 2, 5)
    layer(x.flatten(1)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert not fresh.exists()


def test_a_compiler_that_fails_is_told(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    x = torch.randn(20, 2, 16)
    with pytest.warns(UserWarning, match="could not be used, torch's own functions are taken instead"):
        rb.random_batch_attention(x, x, x, batch_size=5)
    with pytest.raises(ValueError, match="false"):
        rb.random_batch_attention(x, x, x, batch_size=5, backend="cpu")


# What C++ is told


def told(**change: object) -> None:
    """Both directions for four tokens in two batches, with something in place of what belongs there."""
    x, lse, order = torch.ones(4, 2, 16), torch.ones(4, 2), torch.arange(4)
    parts = {"order": order, "starts": order[:2] * 2, "widths": torch.tensor([2, 2]), "groups": [2, 2]}
    parts |= {"shift": None, "seed": None, "scale": 1.0, "dropout_p": 0.0}
    tensors = {name: x.clone() for name in ("query", "key", "value", "out", "grad")} | {"lse": lse, "grad_lse": lse}
    parts |= {name: value for name, value in change.items() if name in parts}
    tensors |= {name: value for name, value in change.items() if name in tensors}
    batches = Batches(**parts)
    query, key, value, out = (tensors[name] for name in ("query", "key", "value", "out"))
    functions = ops.library_for(16, 16).functions()
    if "grad" not in change and "grad_lse" not in change:
        calls.attend_forward(functions, query, key, value, out, tensors["lse"], batches, 1)
    grads = change.get("grads", (x.clone(), x.clone(), x.clone()))
    inputs = tensors["grad"], tensors["grad_lse"], query, key, value, out, tensors["lse"]
    calls.attend_backward(functions, *inputs, grads, batches, 1)


NEGATED = torch.ones(4, 2, 16, dtype=torch.complex64).conj().imag
X = torch.ones(4, 2, 16)
REFUSED = {
    "a key of float64": ({"key": X.double()}, TypeError, "takes key of torch.float32, got torch.float64"),
    "too few values": ({"value": X[:3]}, ValueError, "takes value of shape"),
    "another size of keys": ({"key": X[:, :, :15]}, ValueError, "takes key of shape"),
    "strides in a head": ({"query": torch.ones(4, 16, 2).mT}, ValueError, "adjacent numbers"),
    "a meta tensor": ({"query": X.to("meta")}, TypeError, "in the memory of a CPU"),
    "a sparse tensor": ({"query": X.to_sparse()}, TypeError, "in the memory of a CPU"),
    "negated numbers": ({"query": NEGATED}, TypeError, "in the memory of a CPU"),
    "an output of strides": ({"lse": torch.ones(2, 4).T}, ValueError, "takes lse contiguous"),
    "an output of float16": ({"out": X.half()}, TypeError, "takes out of"),
    "a short output": ({"out": X[:3]}, ValueError, "takes out of shape"),
    "short gradients": ({"grads": (X, X, X[:3])}, ValueError, "takes the gradient of value of shape"),
    "expanded sums": ({"grad_lse": torch.ones(1).expand(4, 2)}, ValueError, "takes grad_lse contiguous"),
    "an order of int32": ({"order": torch.arange(4).int()}, TypeError, "takes order of torch.int64"),
    "a short order": ({"order": torch.arange(3)}, ValueError, "takes order of shape"),
    "one start": ({"starts": torch.zeros(1, dtype=torch.int64)}, ValueError, "takes starts of shape"),
    "widths of a float": ({"widths": torch.full((2,), 2.0)}, TypeError, "takes widths of"),
    "more tokens than there are": ({"groups": [2, 3]}, ValueError, "batches of 4 tokens in all"),
    "negative widths": ({"groups": [-2, -2]}, ValueError, "batches of 4 tokens in all"),
    "a shift of another shape": ({"shift": torch.zeros(2)}, ValueError, "takes shift of shape"),
    "no seed": ({"dropout_p": 0.5}, ValueError, "one seed"),
}


@pytest.mark.unchecked
@pytest.mark.parametrize("name", REFUSED)
def test_what_cpp_would_misread_is_refused(name: str) -> None:
    change, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        told(**change)


def test_what_cpp_reads_as_it_is() -> None:
    told()
    told(order=torch.tensor([[3, 0], [0, 0], [1, 0], [2, 0]])[:, 0], shift=torch.zeros(1).expand(2, 2))
    told(query=X[:1].expand(4, 2, 16), key=torch.nn.Parameter(X), value=torch.ones(4, 4, 16)[:, ::2])


def test_tensors_without_numbers_are_refused() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
    with pytest.raises(TypeError, match="got FakeTensor on cpu"):
        told(query=fake)
    with pytest.raises(TypeError, match="in the memory of a CPU"):
        torch.func.vmap(lambda x: told(query=x) or x)(torch.ones(3, 4, 2, 16))


@pytest.mark.parametrize("name", ["attend_forward", "attend_backward"])
def test_no_memory_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 2^50 tokens: no machine has room for one, and the process goes on."""
    real = calls._told

    def wide(*args: Any) -> Any:
        described = real(*args)
        described.widest = 2**50
        return described

    x, groups = torch.ones(4, 2, 16), [2, 2]
    order = torch.arange(4)
    batches = Batches(order, order[:2] * 2, torch.tensor([2, 2]), groups, None, None, 1.0, 0.0)
    functions = ops.library_for(16, 16).functions()
    monkeypatch.setattr(calls, "_told", wide)
    with pytest.raises(MemoryError, match="take smaller batches"):
        if name == "attend_forward":
            calls.attend_forward(functions, x, x, x, x, x[..., 0].contiguous(), batches, 2)
        else:
            lse = x[..., 0].contiguous()
            calls.attend_backward(functions, x, None, x, x, x, x, lse, (x, x, x), batches, 2)


def test_a_trial_knows_nothing_of_its_caller(fresh: Path) -> None:
    """Built where numbers are fake, rounded or not recorded, and nothing is drawn from the generator."""
    state = torch.get_rng_state()
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        assert ops.library_for(16, 16).why_not() is None
    assert torch.equal(state, torch.get_rng_state())
