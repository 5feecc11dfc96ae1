"""What all fused backends promise, against the formula on the whole matrix in float64. Triton is interpreted."""

import math
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from fusing import FP32, assert_as_good, bias_of, dense, qkv, run
from torch import Tensor

import randbatch as rb
from randbatch.kernels import BACKENDS, Problem, cpu
from randbatch.kernels.triton import ops

OPERATORS = {"triton": ops.OPERATORS, "cpu": cpu.ops.OPERATORS}
NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(params=[pytest.param("triton", marks=NO_TRITON), "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("rounds", [1, 2])
def test_corrected(backend: str, rounds: int) -> None:
    inputs = qkv(40, heads=1)

    def call(name: str):
        options = {"batch_size": 9, "seed": 3, "estimator": "corrected", "rounds": rounds, "backend": name}
        return lambda *x: rb.random_batch_attention(*x, **options)

    truth, plain = run(call("reference"), inputs, torch.float64), run(call("reference"), inputs, FP32)
    assert_as_good(run(call(backend), inputs, FP32), plain, truth)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_log_sum_exp_and_its_gradient(backend: str, exclude_self: bool) -> None:
    part = rb.random_partition(41, 7, seed=2)
    inputs = qkv(41)
    bias = bias_of([part])
    if exclude_self:
        bias = bias.fill_diagonal_(-torch.inf)
    problem = Problem.of(inputs[0], inputs[2], None, need_lse=True, exclude_self=exclude_self)

    def call(*x: Tensor) -> Tensor:
        out, lse = BACKENDS[backend].attend(*x, part, problem, None)
        assert lse is not None
        return torch.cat([out, lse.unsqueeze(2)], dim=2)

    def by_formula(*x: Tensor) -> Tensor:
        out, lse = dense(*x, bias)
        return torch.cat([out, lse.unsqueeze(2)], dim=2)

    truth, plain = run(by_formula, inputs, torch.float64), run(by_formula, inputs, FP32)
    assert_as_good(run(call, inputs, FP32), plain, truth)


def test_a_token_without_keys_gives_nothing(backend: str) -> None:
    inputs = qkv(5)
    part = rb.random_partition(5, 2, batch=torch.tensor([0, 1, 1, 2, 2]))
    problem = Problem.of(inputs[0], inputs[2], None, need_lse=True, exclude_self=True)
    out, lse = BACKENDS[backend].attend(*inputs, part, problem, None)
    assert lse is not None
    assert torch.equal(out[0], torch.zeros(2, 16))
    assert (lse[0] == -torch.inf).all()
    assert lse[1:].isfinite().all()
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()


def test_backward_takes_the_output_of_attention_over_more_keys(backend: str) -> None:
    """Weights exp(s − lse) that do not add up to one inside a batch, as where rounds are merged."""
    part = rb.random_partition(30, 8, seed=1)
    inputs = qkv(30)
    problem = Problem.of(inputs[0], inputs[2], None, need_lse=True, exclude_self=True)
    grad, out = torch.randn(2, 30, 2, 16).unbind()
    lse = 3 + torch.rand(30, 2)
    tensors = (grad, *(x.detach() for x in inputs), out, lse)
    want = tuple(torch.empty(30, 2, 16, dtype=torch.float64) for _ in range(3))
    exact_problem = replace(problem, dtype=torch.float64)
    BACKENDS["reference"].backward(*(x.double() for x in tensors), part, exact_problem, want)
    for got in (torch.full((3, 30, 2, 16), torch.nan), torch.full((30, 3, 2, 16), torch.nan).transpose(0, 1)):
        BACKENDS[backend].backward(*tensors, part, problem, got.unbind())
        for ours, exact in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite(backend: str) -> None:
    query, key, value = (100 * x.detach() for x in qkv(40))
    assert rb.random_batch_attention(query, key, value, batch_size=20, backend=backend).isfinite().all()


def test_nan_in_gives_nan_out(backend: str) -> None:
    for position in range(3):
        inputs = [x.detach() for x in qkv(40)]
        inputs[position][5, 0, 0] = torch.nan
        part = rb.random_partition(40, 8, seed=0)
        out = rb.random_batch_attention(*inputs, partition=part, backend=backend)
        mates = part.index[(part.index == 5).any(dim=1)].flatten().tolist()
        touched = out[:, 0].isnan().any(dim=1).nonzero().flatten().tolist()
        assert touched == ([5] if position == 0 else sorted(mates))


# Dropout


def dropped_weights(
    backend: str, query: Tensor, key: Tensor, part: rb.Partition, seed: int, dropout_p: float = 0.3
) -> Tensor:
    """The weights themselves `[H, N, N]`: values are unit vectors."""
    torch.manual_seed(seed)
    units = torch.eye(len(query)).unsqueeze(1).expand(-1, query.shape[1], -1)
    options = {"partition": part, "dropout_p": dropout_p, "backend": backend}
    return rb.random_batch_attention(query, key, units, **options).detach().transpose(0, 1)


def test_dropout_drops_at_random_and_scales_the_rest(backend: str) -> None:
    query, key, _ = qkv(96)
    part = rb.random_partition(96, 48, seed=0)
    bias = bias_of([part])
    weights = dense(query.detach(), key.detach(), torch.eye(96).unsqueeze(1).expand(-1, 2, -1), bias)[0].transpose(0, 1)
    got = dropped_weights(backend, query, key, part, seed=5)
    meets = (bias > -torch.inf).expand(2, -1, -1)
    kept = got > 0
    torch.testing.assert_close(got[kept], weights[kept] / 0.7, rtol=1e-5, atol=1e-6)
    assert not (kept & ~meets).any()
    number = int(meets.sum())
    deviation = math.sqrt(0.3 * 0.7 * number)
    assert abs(int((meets & ~kept).sum()) - 0.3 * number) < 4.5 * deviation
    pairs = [
        (kept[0], kept[1]),
        (kept, kept.transpose(1, 2)),
        (kept, dropped_weights(backend, query, key, part, seed=6) > 0),
    ]
    for one, other in pairs:  # heads, (i, j) and (j, i), seeds: independent of one another
        both = (one & other)[meets[0] if one.dim() == 2 else meets].double()
        off = both if one.dim() == 2 else (one & other)[meets & ~torch.eye(96, dtype=torch.bool)].double()
        assert abs(off.mean().item() - 0.49) < 4.5 * 2 * math.sqrt(0.49 * 0.51 / off.numel())
    assert torch.equal(got, dropped_weights(backend, query, key, part, seed=5))


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(40, 20), (70, 70)])
def test_gradients_with_dropout_are_those_of_the_same_mask(backend: str, num_tokens: int, batch_size: int) -> None:
    inputs = qkv(num_tokens)
    part = rb.random_partition(num_tokens, batch_size, seed=0)
    factor = (dropped_weights(backend, *inputs[:2], part, seed=5) > 0) / 0.7

    def call(*x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return rb.random_batch_attention(*x, partition=part, dropout_p=0.3, backend=backend)

    bias = bias_of([part])
    truth = run(lambda *x: dense(*x, bias, factor)[0], inputs, torch.float64)
    plain = run(lambda *x: dense(*x, bias, factor)[0], inputs, FP32)
    assert_as_good(run(call, inputs, FP32), plain, truth)


def test_dropout_in_rounds_has_the_gradient_of_its_values(backend: str) -> None:
    """Merged by log-sum-exps that have a gradient themselves: against a difference of values along a direction."""
    inputs = [x.detach() for x in qkv(8, heads=1)]
    directions = [torch.randn_like(x) for x in inputs]

    def value(step: float, seed: int = 5) -> Tensor:
        torch.manual_seed(seed)
        moved = [(x + step * d).requires_grad_() for x, d in zip(inputs, directions, strict=True)]
        options = {"batch_size": 4, "rounds": 2, "seed": 1, "estimator": "debiased", "dropout_p": 0.4}
        out = rb.random_batch_attention(*moved, **options, backend=backend).sin().sum()
        grads = torch.autograd.grad(out, moved)
        return torch.stack([out, sum((g * d).sum() for g, d in zip(grads, directions, strict=True))]).detach()

    (_, slope), (above, _), (below, _) = value(0.0), value(5e-3), value(-5e-3)
    assert (above - below).item() / 1e-2 == pytest.approx(slope.item(), rel=2e-3)
    assert value(0.0)[0] != value(0.0, seed=6)[0]


def test_activation_checkpointing_replays_dropout(backend: str) -> None:
    inputs = qkv(30)

    def step(*x: Tensor) -> Tensor:
        return rb.random_batch_attention(*x, batch_size=8, dropout_p=0.2, backend=backend)

    grads = []
    for call in (step, lambda *x: torch.utils.checkpoint.checkpoint(step, *x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(*inputs).square().sum(), inputs))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


# As operators of torch


def arguments(dropout_p: float = 0.0, shift: bool = False) -> tuple:
    part = rb.random_partition(21, 6, seed=1)
    inputs = qkv(21, size=12, value_size=8)
    batches = (part.order, *part.starts_and_widths(), [number for group in part.groups for number in group])
    own = torch.randn(part.num_batches, 2) if shift else None
    seed = torch.tensor([7]) if dropout_p else None
    return (*inputs, *batches, own, seed, 0.3, dropout_p)


@pytest.mark.parametrize(("dropout_p", "shift"), [(0.0, False), (0.2, True)])
def test_opcheck(backend: str, dropout_p: float, shift: bool) -> None:
    values = arguments(dropout_p, shift)
    torch.library.opcheck(OPERATORS[backend].attend, values)
    detached = [x.detach() for x in values[:3]]
    out, lse = OPERATORS[backend].attend(*detached, *values[3:])
    for grad_lse in (None, torch.randn_like(lse)):
        tensors = torch.randn_like(out), grad_lse, *detached, out, lse
        torch.library.opcheck(OPERATORS[backend].backward, (*tensors, *values[3:]))


COMPILED = """
import sys, torch, randbatch as rb
backend = sys.argv[1]
torch.manual_seed(0)
inputs = [torch.randn(40, 1, 16, requires_grad=True) for _ in range(3)]
part = rb.random_partition(40, 9, seed=1)
for options in ({}, {"estimator": "debiased"}):
    def function(query, key, value):
        return rb.random_batch_attention(2 * query, key, value, partition=part, backend=backend, **options).sin()
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        out = call(*inputs)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
print("the same")
"""


def test_compiles_without_a_graph_break(backend: str) -> None:
    """In a process of its own, where annotations are not checked: those checks cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED, backend], capture_output=True, text=True, check=False)
    assert done.stdout == "the same\n", done.stderr


def test_a_module_trains_with_it(backend: str) -> None:
    """One step of the module, fp32, against the reference backend."""
    grads = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        module = rb.nn.RandomBatchAttention(32, 2, 16, backend=name)
        module(torch.randn(50, 32)).square().mean().backward()
        grads.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
