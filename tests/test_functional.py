"""The op against exact limits, float64, and counts; nothing here trusts the code under test."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import randbatch as rb
from randbatch.kernels import BACKENDS, Problem, pick_backend

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def qkv(num_tokens: int, heads: int = 2, size: int = 8, value_size: int = 8, dtype=torch.float64, grad: bool = False):
    make = [torch.randn(num_tokens, heads, d, dtype=torch.float64) for d in (size, size, value_size)]
    return [x.to(dtype).requires_grad_(grad) for x in make]


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """The formula, in the dtype it is given."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = torch.einsum("ihd,jhd->hij", query, key) * scale
    return torch.einsum("hij,jhe->ihe", torch.softmax(logits, -1), value)


def in_batches(query: Tensor, key: Tensor, value: Tensor, part: rb.Partition) -> Tensor:
    """The formula inside each batch, one after the other."""
    out = torch.zeros(*value.shape, dtype=value.dtype)
    for row in range(part.index.shape[0]):
        tokens = part.index[row] if part.mask is None else part.index[row][part.mask[row]]
        out[tokens] = attention(query[tokens], key[tokens], value[tokens])
    return out


def linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Linear attention as a matrix of weights."""
    weights = torch.einsum("ihd,jhd->hij", torch.nn.functional.elu(query) + 1, torch.nn.functional.elu(key) + 1)
    return torch.einsum("hij,jhe->ihe", weights / weights.sum(-1, keepdim=True), value)


# Exact limits


@pytest.mark.parametrize("num_tokens", [1, 2, 57])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("value_size", [8, 5])
def test_one_batch_is_full_attention(num_tokens: int, rounds: int, value_size: int) -> None:
    inputs = qkv(num_tokens, value_size=value_size, grad=True)
    weight = torch.randn(num_tokens, 2, value_size, dtype=torch.float64)
    expected = attention(*inputs)
    want = torch.autograd.grad((expected * weight).sum(), inputs)
    outs = [
        rb.random_batch_attention(*inputs, batch_size=max(num_tokens, 2), rounds=rounds, backend=backend)
        for backend in ("auto", "reference", *(["sdpa"] if rounds == 1 or value_size == 8 else []))
    ]
    outs += [rb.full_attention(*inputs), rb.full_attention(*inputs, chunk_size=10)]
    for out in outs:
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_one_batch_of_linear_is_linear_attention() -> None:
    inputs = qkv(41)
    for rounds in (1, 2):
        out = rb.random_batch_attention(*inputs, batch_size=41, rounds=rounds, interaction="linear")
        torch.testing.assert_close(out, linear(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "reference", "auto"])
def test_attention_stays_inside_the_batches(backend: str) -> None:
    part = rb.random_partition(29, 8, seed=3)
    inputs = qkv(29, grad=True)
    expected = in_batches(*inputs, part)
    for call in ({"partition": part}, {"batch_size": 8, "seed": 3}, {"partition": part, "batch_size": 8}):
        out = rb.random_batch_attention(*inputs, backend=backend, **call)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), inputs), want, rtol=1e-11, atol=1e-12)


def test_graphs_never_mix() -> None:
    graph = torch.randint(0, 4, (60,))
    inputs = qkv(60)
    for out in (
        rb.full_attention(*inputs, batch=graph),
        rb.full_attention(*inputs, batch=graph.int(), chunk_size=3),
        rb.random_batch_attention(*inputs, batch_size=60, batch=graph),
    ):
        for g in range(4):
            mine = graph == g
            torch.testing.assert_close(out[mine], attention(*(x[mine] for x in inputs)), rtol=1e-12, atol=1e-12)


def test_more_rounds_are_closer() -> None:
    inputs = qkv(512, heads=4, size=16, value_size=16)
    exact = rb.full_attention(*inputs)
    errors = [
        (rb.random_batch_attention(*inputs, batch_size=32, rounds=r, seed=0) - exact).norm().item() for r in (1, 4, 16)
    ]
    assert errors[0] > 1.6 * errors[1] > 1.6**2 * errors[2]


# Derivatives and numerics


@pytest.mark.parametrize("num_tokens", [1, 5, 7])
@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"rounds": 2}, {"interaction": "linear"}])
def test_gradcheck(num_tokens: int, options: dict) -> None:
    inputs = qkv(num_tokens, heads=2, size=3, value_size=3, grad=True)
    assert torch.autograd.gradcheck(lambda *x: rb.random_batch_attention(*x, batch_size=3, seed=1, **options), inputs)


def test_gradcheck_of_full_attention() -> None:
    graph = torch.tensor([0, 1, 0, 1, 1])
    inputs = qkv(5, heads=1, size=3, value_size=2, grad=True)
    assert torch.autograd.gradcheck(lambda *x: rb.full_attention(*x, batch=graph, chunk_size=2), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_error_within_twice_the_formulas_own(backend: str, dtype: torch.dtype) -> None:
    """Against float64, outputs and gradients err at most twice as much as plain torch does in the same dtype."""
    part = rb.random_partition(96, 32, seed=2)
    inputs = qkv(96, heads=2, size=16, value_size=16, dtype=dtype, grad=True)
    weight = torch.randn(96, 2, 16, dtype=torch.float64).to(dtype)

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]

    truth = run(lambda *x: in_batches(*x, part), torch.float64)
    plain = run(lambda *x: in_batches(*x, part), dtype)
    ours = run(lambda *x: rb.random_batch_attention(*x, partition=part, backend=backend), dtype)
    for exact, theirs, mine in zip(truth, plain, ours, strict=True):
        assert mine.dtype == dtype
        noise = (theirs.double() - exact).norm().item()
        floor = 4 * torch.finfo(dtype).eps * exact.norm().item()  # of values that are exact by luck
        assert (mine.double() - exact).norm().item() <= max(2 * noise, floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_keep_the_dtype(dtype: torch.dtype) -> None:
    inputs = qkv(40, dtype=dtype)
    out = rb.random_batch_attention(*inputs, batch_size=8, rounds=3, seed=0)
    exact = rb.random_batch_attention(*(x.double() for x in inputs), batch_size=8, rounds=3, seed=0)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize(
    "options",
    [{}, {"rounds": 2}, {"backend": "reference"}, {"backend": "sdpa"}, {"interaction": "linear"}, {"chunk_batches": 2},
     {"estimator": "debiased"}, {"estimator": "corrected"}],
)  # fmt: skip
def test_autocast_casts_the_inputs_and_rounds_no_sums(options: dict) -> None:
    """The rule of SDPA under autocast, whichever backend computes: inputs are cast, also where their dtypes differ."""
    query, key, value = qkv(40, dtype=torch.float32)
    cast = [x.to(torch.bfloat16) for x in (query, key, value)]
    out = rb.random_batch_attention(*cast, batch_size=8, seed=0, **options)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rb.random_batch_attention(query, cast[1], value, batch_size=8, seed=0, **options)
        torch_out = torch.nn.functional.scaled_dot_product_attention(query, cast[1], value)
    assert mixed.dtype == torch_out.dtype == torch.bfloat16
    assert torch.equal(mixed, out)


def test_autocast_leaves_float64() -> None:
    inputs = qkv(40)
    with torch.autocast("cpu", torch.bfloat16):
        assert rb.random_batch_attention(*inputs, batch_size=8).dtype == torch.float64
        assert rb.full_attention(*inputs).dtype == torch.float64


def test_large_logits_stay_finite() -> None:
    query, key, value = (100 * x for x in qkv(64, dtype=torch.float32))
    out = rb.random_batch_attention(query, key, value, batch_size=16, rounds=2)
    assert out.isfinite().all()


def test_nan_in_gives_nan_out() -> None:
    query, key, value = qkv(64)
    value[5, 0, 0] = torch.nan
    part = rb.random_partition(64, 8, seed=0)
    out = rb.random_batch_attention(query, key, value, partition=part)
    touched = out.isnan().any(2).any(1)
    row = (part.index == 5).any(1)
    assert sorted(touched.nonzero().flatten().tolist()) == sorted(part.index[row].flatten().tolist())


def test_scale_and_dropout() -> None:
    inputs = qkv(16)
    out = rb.random_batch_attention(*inputs, batch_size=16, scale=0.3)
    torch.testing.assert_close(out, attention(*inputs, scale=0.3), rtol=1e-12, atol=1e-12)
    ones = [*inputs[:2], torch.ones_like(inputs[2])]
    for backend in ("sdpa", "reference"):
        torch.manual_seed(0)
        draws = torch.stack(
            [rb.random_batch_attention(*ones, batch_size=16, dropout_p=0.25, backend=backend) for _ in range(400)]
        )
        assert draws.mean().item() == pytest.approx(1.0, abs=0.01)  # unbiased
        assert draws.std() > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_weights_are_dropped_as_are_asked_for(backend: str) -> None:
    """Of n equal weights, seen one by one, np are dropped to 6 standard errors of a binomial; the rest are scaled."""
    dropout_p = 0.4
    problem = Problem(torch.device("cpu"), torch.float32, 16, 16, 0.25, dropout_p)
    reason = BACKENDS[backend].why_not(problem)
    if reason is not None:
        pytest.skip(reason)
    batches = 24 if backend == "triton" else 1024  # an interpreter runs it
    part = rb.Partition(torch.arange(16 * batches), ((batches, 16),))
    same = torch.zeros(16 * batches, 4, 16)
    units = torch.eye(16).repeat(batches, 1).unsqueeze(1).expand(-1, 4, -1).contiguous()
    torch.manual_seed(3)
    weights = rb.random_batch_attention(same, same, units, partition=part, dropout_p=dropout_p, backend=backend)
    kept = weights != 0
    number = weights.numel()
    deviation = math.sqrt(dropout_p * (1 - dropout_p) * number)
    assert 6 * deviation < 0.05 * dropout_p * number  # a probability that is ten per cent off is seen
    assert abs(int((~kept).sum()) - dropout_p * number) < 6 * deviation
    torch.testing.assert_close(weights[kept], torch.full((int(kept.sum()),), 1 / 16 / (1 - dropout_p)))


# Randomness


def test_the_default_generator_is_the_only_randomness() -> None:
    inputs = qkv(50)
    torch.manual_seed(7)
    first = [rb.random_batch_attention(*inputs, batch_size=8) for _ in range(2)]
    torch.manual_seed(7)
    again = [rb.random_batch_attention(*inputs, batch_size=8) for _ in range(2)]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    state = torch.get_rng_state()
    fixed = [rb.random_batch_attention(*inputs, batch_size=8, seed=5, rounds=2) for _ in range(2)]
    assert torch.equal(*fixed)
    assert torch.equal(state, torch.get_rng_state())  # a seed leaves the generator alone


def test_activation_checkpointing_replays_the_partition() -> None:
    inputs = qkv(50, grad=True)

    def step(*x: Tensor) -> Tensor:
        return rb.random_batch_attention(*x, batch_size=8)

    grads = []
    for call in (step, lambda *x: torch.utils.checkpoint.checkpoint(step, *x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(*inputs).square().sum(), inputs))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


# Memory


def test_full_attention_keeps_no_logits() -> None:
    """A head size the fused kernel refuses, N² logits of 1.6 GB: the peak stays far below."""
    code = """
import resource, torch, randbatch as rb
q, k = torch.randn(2, 10_000, 4, 8).unbind(); v = torch.randn(10_000, 4, 4)
[x.requires_grad_() for x in (q, k, v)]
rb.full_attention(q[:64], k[:64], v[:64]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rb.full_attention(q, k, v).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 800  # MiB; a chunk is 64, and softmax and its backward hold a few


# Bad input


def test_empty_and_single() -> None:
    for rounds in (1, 2):
        empty = rb.random_batch_attention(*qkv(0, value_size=5), batch_size=4, rounds=rounds)
        assert empty.shape == (0, 2, 5)
        one = qkv(1)
        torch.testing.assert_close(rb.random_batch_attention(*one, batch_size=4, rounds=rounds), one[2])
    assert rb.full_attention(*qkv(0, value_size=5)).shape == (0, 2, 5)
    assert rb.full_attention(*qkv(0), batch=torch.zeros(0, dtype=torch.int64)).shape == (0, 2, 8)


def spoil(position: int, change) -> list[Tensor]:
    inputs = qkv(6)
    inputs[position] = change(inputs[position])
    return inputs


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (spoil(0, lambda x: x[0]), {}, ValueError, r"query must have shape \[N, H, D\]"),
        (spoil(1, lambda x: x[:5]), {}, ValueError, "key has 5 tokens and 2 heads but query has 6 and 2"),
        (spoil(2, lambda x: x[:, :1]), {}, ValueError, "value has 6 tokens and 1 heads"),
        (spoil(1, lambda x: x[..., :4]), {}, ValueError, "key has head size 4 but query has 8"),
        (spoil(0, lambda x: x.long()), {}, TypeError, "query must be a floating-point tensor, got torch.int64"),
        (spoil(1, lambda x: x.float()), {}, TypeError, "key has dtype torch.float32 but query has torch.float64"),
        (spoil(2, lambda x: x.to("meta")), {}, ValueError, "value is on meta but query is on cpu"),
        (qkv(6), {"batch_size": 1}, ValueError, "batch_size must be at least 2, got 1"),
        (qkv(6), {"batch_size": 2.0}, TypeError, "batch_size must be an int, got float"),
        (qkv(6), {"batch_size": None}, TypeError, "batch_size is missing"),
        (qkv(6), {"rounds": 0}, ValueError, "rounds must be at least 1"),
        (qkv(6), {"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\)"),
        (qkv(6), {"seed": 1.5}, TypeError, "seed must be an int"),
        (qkv(6), {"batch": torch.zeros(5, dtype=torch.int64)}, ValueError, r"batch must have shape \[6\]"),
        (qkv(6), {"batch": torch.zeros(6)}, TypeError, "batch must be an int64 or int32 tensor"),
        (qkv(6), {"estimator": "plane"}, ValueError, "estimator must be one of 'plain'.* Did you mean 'plain'"),
        (qkv(6), {"backend": "spda"}, ValueError, "Did you mean 'sdpa'"),
        (qkv(6), {"interaction": "softmx"}, ValueError, "Did you mean 'softmax'"),
        (
            qkv(6, value_size=5),
            {"backend": "sdpa", "rounds": 2},
            ValueError,
            "backend 'sdpa' cannot be used here: with values of size 5",
        ),
        (qkv(6), {"interaction": "linear", "scale": 1.0}, ValueError, "scale must be None with interaction 'linear'"),
        (qkv(6), {"interaction": "linear", "dropout_p": 0.1}, ValueError, "dropout_p must be 0 with interaction"),
        (qkv(6), {"interaction": "linear", "backend": "sdpa"}, ValueError, "backend must be 'auto' with interaction"),
        (qkv(6), {"partition": rb.random_partition(5, 2)}, ValueError, "partition is of 5 tokens, but query has 6"),
        (
            qkv(6),
            {"partition": rb.random_partition(6, 2), "rounds": 2},
            ValueError,
            "rounds must be 1 when",
        ),
    ],
)
def test_bad_input(inputs: list[Tensor], options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rb.random_batch_attention(*inputs, **({"batch_size": 3} | options))


@pytest.mark.unchecked
def test_bad_input_of_full_attention() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        rb.full_attention(*qkv(6), chunk_size=0)
    with pytest.raises(ValueError, match=r"batch must have shape \[6\]"):
        rb.full_attention(*qkv(6), batch=torch.zeros(5, dtype=torch.int64))


def test_backend_table_speaks() -> None:
    problem = Problem(torch.device("cpu"), torch.float64, 8, 8, 1.0, need_lse=True)
    assert pick_backend("auto", problem) is BACKENDS["sdpa"]
    single = replace(problem, dtype=torch.float32)
    assert pick_backend("auto", single) is BACKENDS["sdpa" if BACKENDS["cpu"].why_not(single) else "cpu"]
    for hard in (
        replace(problem, dropout_p=0.1),
        replace(problem, device=torch.device("cuda")),
        replace(problem, value_size=4),
    ):
        assert pick_backend("auto", hard) is BACKENDS["reference"]
        assert BACKENDS["sdpa"].why_not(hard) is not None
    assert pick_backend("auto", replace(problem, need_lse=False)) is BACKENDS["sdpa"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{"batch_size": 70}, {"batch_size": 9}, {"batch_size": 9, "rounds": 3}])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_any_strides(backend: str, options: dict, dtype: torch.dtype) -> None:
    """Kernels may take the numbers of a head for adjacent; a view of another layout gives the same as its copy."""
    whole = torch.randn(3, 70, 2, 4, 2).to(dtype)

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        outs = [rb.random_batch_attention(*leaves, seed=0, backend=backend, **options), rb.full_attention(*leaves)]
        out = torch.stack(outs)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    for found, want in zip(run([x[..., 1] for x in whole]), run([x[..., 1].contiguous() for x in whole]), strict=True):
        torch.testing.assert_close(found, want)
