"""The compiled CPU backend: against the formula in float64, and what happens where it cannot be compiled."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fusing import FP32, assert_as_good, bias_of, dense, qkv, run

import randbatch as rb
from randbatch.kernels import BACKENDS, Problem
from randbatch.kernels.cpu import build, ops
from randbatch.orthogonal import draw_rounds

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
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing built, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (build._build, build._folder):
        function.cache_clear()
    yield tmp_path / "randbatch"
    for function in (build._build, build._folder):
        function.cache_clear()


def test_it_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.why_not_built_for(16, 16) is None
    (made,) = fresh.iterdir()
    when = made.stat().st_mtime_ns
    build._build.cache_clear()
    assert ops.why_not_built_for(16, 16) is None
    assert [(path, path.stat().st_mtime_ns) for path in fresh.iterdir()] == [(made, when)]
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
    with pytest.warns(UserWarning, match="could not be built"):
        rb.random_batch_attention(x, x, x, batch_size=5)
    with pytest.raises(ValueError, match="false"):
        rb.random_batch_attention(x, x, x, batch_size=5, backend="cpu")


def test_a_cache_of_somebody_else_is_not_used(fresh: Path) -> None:
    fresh.parent.joinpath("randbatch").write_text("a file where the folder should be")
    assert ops.why_not_built_for(16, 16) is None
    assert build._folder() != fresh
