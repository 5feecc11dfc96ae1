"""The Triton backend, interpreted on the CPU, against the formula on the whole matrix in float64."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import randbatch as rb
from randbatch.kernels import BACKENDS, Problem, pick_backend
from randbatch.kernels.triton import ops
from randbatch.kernels.triton.tiles import backward_launches, forward_launches
from randbatch.orthogonal import draw_rounds

pytest.importorskip("triton", reason="the Triton backend is tested where triton is installed")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def qkv(num_tokens: int, size: int = 16, value_size: int = 16, dtype: torch.dtype = FP32, heads: int = 2):
    sizes = (size, size, value_size)
    return [torch.randn(num_tokens, heads, d, dtype=torch.float64).to(dtype).requires_grad_() for d in sizes]


def bias_of(parts: list[rb.Partition], batch: Tensor | None = None, debias: float = 0.0) -> Tensor:
    """What is added to the logits `[N, N]`: −∞ for a pair that does not meet, δ log κ for one that does."""
    num_tokens = parts[0].num_tokens
    met = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for part in parts:
        for block in part.split(part.order):
            for tokens in block:
                met[tokens.unsqueeze(1), tokens] = True
    sizes = torch.full((num_tokens,), num_tokens) if batch is None else torch.bincount(batch)[batch]
    met = met.fill_diagonal_(False)
    kappa = (sizes - 1).clamp(min=1).double() / met.sum(dim=1).clamp(min=1)
    return (debias * kappa.log()).unsqueeze(1).masked_fill(~met, -torch.inf).fill_diagonal_(0)


def dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, factor: Tensor | None = None):
    """Output and log-sum-exp by the formula, in the dtype that it is given; `factor` `[H, N, N]` is dropout's."""
    logits = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1]) + bias.to(query.dtype)
    weights = torch.softmax(logits, dim=-1) * (1 if factor is None else factor.to(query.dtype))
    return torch.einsum("hij,jhe->ihe", weights, value), logits.logsumexp(dim=-1).T


def run(function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of a fixed weighted sum of it."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape).to(inputs[0].dtype).to(dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def assert_as_good(mine: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Errors at most twice those of plain torch in the same dtype."""
    for ours, theirs, exact in zip(mine, plain, truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == exact.shape
        noise = (theirs.double() - exact).norm().item()
        floor = 4 * torch.finfo(theirs.dtype).eps * exact.norm().item()  # of values that are exact by luck
        assert (ours.double() - exact).norm().item() <= max(2 * noise, floor)


def compare(inputs: list[Tensor], bias: Tensor, part: rb.Partition) -> None:
    """Against the formula, and as good as the formula in the same dtype."""
    dtype = inputs[0].dtype
    truth = run(lambda *x: dense(*x, bias)[0], inputs, torch.float64)
    plain = run(lambda *x: dense(*x, bias)[0], inputs, dtype)
    mine = run(lambda *x: rb.random_batch_attention(*x, partition=part, backend="triton"), inputs, dtype)
    assert_as_good(mine, plain, truth)


# Values and gradients

SHAPES = [  # N, p, D, Dv, dtype: every padding of D, batches of one tile, of a part of one, of several
    (9, 2, 16, 16, FP32),
    (37, 8, 32, 32, BF16),
    (50, 16, 8, 8, FP16),
    (61, 17, 64, 64, FP16),
    (70, 33, 20, 12, FP32),
    (99, 50, 128, 128, BF16),
    (100, 100, 5, 3, FP32),
    (300, 300, 8, 40, BF16),
    (290, 145, 100, 100, FP16),
    (65, 65, 16, 16, FP32),
    (520, 260, 16, 16, BF16),
]


@pytest.mark.parametrize(("num_tokens", "batch_size", "size", "value_size", "dtype"), SHAPES)
def test_error_within_twice_the_formulas_own(
    num_tokens: int, batch_size: int, size: int, value_size: int, dtype: torch.dtype
) -> None:
    part = rb.random_partition(num_tokens, batch_size, seed=1)
    inputs = qkv(num_tokens, size, value_size, dtype, heads=1 if num_tokens > 200 else 2)
    compare(inputs, bias_of([part]), part)


@pytest.mark.parametrize(
    ("estimator", "rounds", "sets", "dtype"),
    [
        ("plain", 1, 4, FP32),
        ("plain", 3, 1, BF16),
        ("plain", 3, 4, FP32),
        ("debiased", 1, 1, FP16),
        ("debiased", 1, 4, BF16),
        ("debiased", 3, 1, FP32),
        ("debiased", 3, 4, FP16),
    ],
)
def test_estimators(estimator: str, rounds: int, sets: int, dtype: torch.dtype) -> None:
    """Own logits that are shifted, left out, merged; graphs of many sizes; tokens that are alone.

    Against the formula, and as good as plain torch in the same dtype, which here is the reference backend: merging
    rounds has an error of its own.
    """
    num_tokens = 33
    batch = None if sets == 1 else torch.tensor([0, 0, 1, 1, 1, 1, 1, 3, 3, 3, 4]).repeat(3)
    if batch is not None:
        batch[0] = 2  # alone in its graph
    options = {"batch_size": 6, "batch": batch, "seed": 3, "estimator": estimator, "rounds": rounds}
    drawn = draw_rounds(num_tokens, 6, rounds, batch=batch, seed=3)
    parts = [drawn] if isinstance(drawn, rb.Partition) else list(drawn)
    bias = bias_of(parts, batch, float(estimator == "debiased"))
    inputs = qkv(num_tokens, dtype=dtype, heads=1)
    truth = run(lambda *x: dense(*x, bias)[0], inputs, torch.float64)
    mine, plain = (
        run(lambda *x, b=backend: rb.random_batch_attention(*x, **options, backend=b), inputs, dtype)
        for backend in ("triton", "reference")
    )
    assert_as_good(mine, plain, truth)


@pytest.mark.parametrize("rounds", [1, 2])
def test_corrected(rounds: int) -> None:
    inputs = qkv(40, heads=1)

    def call(backend: str):
        options = {"batch_size": 9, "seed": 3, "estimator": "corrected", "rounds": rounds, "backend": backend}
        return lambda *x: rb.random_batch_attention(*x, **options)

    truth, plain = run(call("reference"), inputs, torch.float64), run(call("reference"), inputs, FP32)
    assert_as_good(run(call("triton"), inputs, FP32), plain, truth)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_log_sum_exp_and_its_gradient(exclude_self: bool) -> None:
    part = rb.random_partition(41, 7, seed=2)
    inputs = qkv(41)
    bias = bias_of([part])
    if exclude_self:
        bias = bias.fill_diagonal_(-torch.inf)
    problem = Problem.of(inputs[0], inputs[2], None, need_lse=True, exclude_self=exclude_self)

    def call(*x: Tensor) -> Tensor:
        out, lse = BACKENDS["triton"].attend(*x, part, problem, None)
        assert lse is not None
        return torch.cat([out, lse.unsqueeze(2)], dim=2)

    def by_formula(*x: Tensor) -> Tensor:
        out, lse = dense(*x, bias)
        return torch.cat([out, lse.unsqueeze(2)], dim=2)

    truth, plain = run(by_formula, inputs, torch.float64), run(by_formula, inputs, FP32)
    assert_as_good(run(call, inputs, FP32), plain, truth)


def test_a_token_without_keys_gives_nothing() -> None:
    inputs = qkv(5)
    part = rb.random_partition(5, 2, batch=torch.tensor([0, 1, 1, 2, 2]))
    problem = Problem.of(inputs[0], inputs[2], None, need_lse=True, exclude_self=True)
    out, lse = BACKENDS["triton"].attend(*inputs, part, problem, None)
    assert lse is not None
    assert torch.equal(out[0], torch.zeros(2, 16))
    assert (lse[0] == -torch.inf).all()
    assert lse[1:].isfinite().all()
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()


def test_backward_takes_the_output_of_attention_over_more_keys() -> None:
    """Weights exp(s − lse) that do not add up to one inside a batch, as where rounds are merged."""
    part = rb.random_partition(30, 8, seed=1)
    inputs = qkv(30)
    problem = Problem.of(inputs[0], inputs[2], None, need_lse=True, exclude_self=True)
    grad, out = torch.randn(2, 30, 2, 16).unbind()
    lse = 3 + torch.rand(30, 2)
    tensors = (grad, *(x.detach() for x in inputs), out, lse)
    got = BACKENDS["triton"].backward(*tensors, part, problem)
    exact_problem = replace(problem, dtype=torch.float64)
    want = BACKENDS["reference"].backward(*(x.double() for x in tensors), part, exact_problem)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite() -> None:
    query, key, value = (100 * x.detach() for x in qkv(40))
    assert rb.random_batch_attention(query, key, value, batch_size=20, backend="triton").isfinite().all()


def test_nan_in_gives_nan_out() -> None:
    for position in range(3):
        inputs = [x.detach() for x in qkv(40)]
        inputs[position][5, 0, 0] = torch.nan
        part = rb.random_partition(40, 8, seed=0)
        out = rb.random_batch_attention(*inputs, partition=part, backend="triton")
        mates = part.index[(part.index == 5).any(dim=1)].flatten().tolist()
        touched = out[:, 0].isnan().any(dim=1).nonzero().flatten().tolist()
        assert touched == ([5] if position == 0 else sorted(mates))


def test_empty() -> None:
    assert rb.random_batch_attention(*qkv(0, value_size=5), batch_size=4, backend="triton").shape == (0, 2, 5)
    none = torch.zeros(0, dtype=torch.int64)
    out, lse = ops.attend(*qkv(0, value_size=5), none, none, none, [], None, None, 1.0, 0.0)
    assert (out.shape, lse.shape) == ((0, 2, 5), (0, 2))


def test_a_single_token_is_its_own_value() -> None:
    inputs = qkv(1)
    out = rb.random_batch_attention(*inputs, batch_size=4, backend="triton")
    torch.testing.assert_close(out, inputs[2])
    got = torch.autograd.grad(out.sum(), inputs)
    zeros = torch.zeros_like(inputs[0])
    torch.testing.assert_close(got, (zeros, zeros, zeros + 1), rtol=1e-6, atol=1e-6)


# Memory


def test_every_row_is_written_once_and_the_bits_are_always_the_same() -> None:
    inputs = qkv(70, size=16, dtype=FP16)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        runs = [
            run(lambda *x: rb.random_batch_attention(*x, batch_size=35, seed=1, backend="triton"), inputs, FP16)
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


def test_strides_are_taken_as_they_are() -> None:
    """Views of one projection, heads first in memory, a gradient that is expanded."""
    part = rb.random_partition(33, 9, seed=1)
    fused = torch.randn(33, 3, 2, 16).requires_grad_()
    turned = torch.randn(2, 33, 16).transpose(0, 1)
    last = torch.randn(33, 16, 2).transpose(1, 2)
    for inputs in (fused.unbind(1), [turned, turned, turned], [last, last, turned]):
        out = rb.random_batch_attention(*inputs, partition=part, backend="triton")
        want = rb.random_batch_attention(*(x.contiguous() for x in inputs), partition=part, backend="triton")
        assert torch.equal(out, want)
    out = rb.random_batch_attention(*fused.unbind(1), partition=part, backend="triton")
    (got,) = torch.autograd.grad(out.sum(), fused)
    want = rb.random_batch_attention(*fused.unbind(1), partition=part, backend="reference")
    torch.testing.assert_close(got, *torch.autograd.grad(want.sum(), fused), rtol=1e-4, atol=1e-6)


# Dropout


def dropped_weights(query: Tensor, key: Tensor, part: rb.Partition, seed: int, dropout_p: float = 0.3) -> Tensor:
    """The weights themselves `[H, N, N]`: values are unit vectors."""
    torch.manual_seed(seed)
    units = torch.eye(len(query)).unsqueeze(1).expand(-1, query.shape[1], -1)
    options = {"partition": part, "dropout_p": dropout_p, "backend": "triton"}
    return rb.random_batch_attention(query, key, units, **options).detach().transpose(0, 1)


def test_dropout_drops_at_random_and_scales_the_rest() -> None:
    query, key, _ = qkv(96)
    part = rb.random_partition(96, 48, seed=0)
    bias = bias_of([part])
    weights = dense(query.detach(), key.detach(), torch.eye(96).unsqueeze(1).expand(-1, 2, -1), bias)[0].transpose(0, 1)
    got = dropped_weights(query, key, part, seed=5)
    meets = (bias > -torch.inf).expand(2, -1, -1)
    kept = got > 0
    torch.testing.assert_close(got[kept], weights[kept] / 0.7, rtol=1e-5, atol=1e-6)
    assert not (kept & ~meets).any()
    number = int(meets.sum())
    deviation = math.sqrt(0.3 * 0.7 * number)
    assert abs(int((meets & ~kept).sum()) - 0.3 * number) < 4.5 * deviation
    pairs = [(kept[0], kept[1]), (kept, kept.transpose(1, 2)), (kept, dropped_weights(query, key, part, seed=6) > 0)]
    for one, other in pairs:  # heads, (i, j) and (j, i), seeds: independent of one another
        both = (one & other)[meets[0] if one.dim() == 2 else meets].double()
        off = both if one.dim() == 2 else (one & other)[meets & ~torch.eye(96, dtype=torch.bool)].double()
        assert abs(off.mean().item() - 0.49) < 4.5 * 2 * math.sqrt(0.49 * 0.51 / off.numel())
    assert torch.equal(got, dropped_weights(query, key, part, seed=5))


def test_dropout_does_not_depend_on_the_tiles() -> None:
    """The same pair of tokens has the same fate in batches of other sizes."""
    query, key, _ = qkv(64)
    small, large = rb.random_partition(64, 16, seed=0), rb.random_partition(64, 64, seed=0)
    masks = [dropped_weights(query, key, part, seed=5) > 0 for part in (small, large)]
    meets = bias_of([small]) > -torch.inf
    assert torch.equal(masks[0][:, meets], masks[1][:, meets])


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(40, 20), (70, 70)])
def test_gradients_with_dropout_are_those_of_the_same_mask(num_tokens: int, batch_size: int) -> None:
    inputs = qkv(num_tokens)
    part = rb.random_partition(num_tokens, batch_size, seed=0)
    factor = (dropped_weights(*inputs[:2], part, seed=5) > 0) / 0.7

    def call(*x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return rb.random_batch_attention(*x, partition=part, dropout_p=0.3, backend="triton")

    bias = bias_of([part])
    truth = run(lambda *x: dense(*x, bias, factor)[0], inputs, torch.float64)
    plain = run(lambda *x: dense(*x, bias, factor)[0], inputs, FP32)
    assert_as_good(run(call, inputs, FP32), plain, truth)


def test_dropout_in_rounds_has_the_gradient_of_its_values() -> None:
    """Merged by log-sum-exps that have a gradient themselves: against a difference of values along a direction."""
    inputs = [x.detach() for x in qkv(8, heads=1)]
    directions = [torch.randn_like(x) for x in inputs]

    def value(step: float, seed: int = 5) -> Tensor:
        torch.manual_seed(seed)
        moved = [(x + step * d).requires_grad_() for x, d in zip(inputs, directions, strict=True)]
        options = {"batch_size": 4, "rounds": 2, "seed": 1, "estimator": "debiased", "dropout_p": 0.4}
        out = rb.random_batch_attention(*moved, **options, backend="triton").sin().sum()
        grads = torch.autograd.grad(out, moved)
        return torch.stack([out, sum((g * d).sum() for g, d in zip(grads, directions, strict=True))]).detach()

    (_, slope), (above, _), (below, _) = value(0.0), value(5e-3), value(-5e-3)
    assert (above - below).item() / 1e-2 == pytest.approx(slope.item(), rel=2e-3)
    assert value(0.0)[0] != value(0.0, seed=6)[0]


def test_activation_checkpointing_replays_dropout() -> None:
    inputs = qkv(30)

    def step(*x: Tensor) -> Tensor:
        return rb.random_batch_attention(*x, batch_size=8, dropout_p=0.2, backend="triton")

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
def test_opcheck(dropout_p: float, shift: bool) -> None:
    values = arguments(dropout_p, shift)
    torch.library.opcheck(ops.attend, values)
    detached = [x.detach() for x in values[:3]]
    out, lse = ops.attend(*detached, *values[3:])
    for grad_lse in (None, torch.randn_like(lse)):
        torch.library.opcheck(ops.backward, (torch.randn_like(out), grad_lse, *detached, out, lse, *values[3:]))


COMPILED = """
import torch, randbatch as rb
torch.manual_seed(0)
inputs = [torch.randn(40, 1, 16, requires_grad=True) for _ in range(3)]
part = rb.random_partition(40, 9, seed=1)
for options in ({}, {"estimator": "debiased"}):
    def function(query, key, value):
        return rb.random_batch_attention(2 * query, key, value, partition=part, backend="triton", **options).sin()
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        out = call(*inputs)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
print("the same")
"""


def test_compiles_without_a_graph_break() -> None:
    """In a process of its own, where annotations are not checked: those checks cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout == "the same\n", done.stderr


def test_a_module_trains_with_it() -> None:
    """One step of the module, fp32, against the reference backend."""
    grads = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        module = rb.nn.RandomBatchAttention(32, 2, 16, backend=backend)
        module(torch.randn(50, 32)).square().mean().backward()
        grads.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


# Which launches, and when the backend refuses


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("size", [8, 32, 64, 128])
@pytest.mark.parametrize("dropout", [False, True])
def test_launches_cover_every_row_of_every_batch_once(dtype: torch.dtype, size: int, dropout: bool) -> None:
    groups = [3, 4096, 1, 4095, 2, 300, 5, 257, 5, 256, 1, 129, 4, 64, 7, 33, 2, 32, 9, 5, 1, 1]
    widths = [width for rows, width in zip(groups[::2], groups[1::2], strict=True) for _ in range(rows)]
    x = torch.empty(1, 1, size, dtype=dtype)
    forward = list(forward_launches(groups, x, x))
    queries, keys = backward_launches(groups, x, x, dropout)
    for launches, rows_of in ((forward, "rows"), (queries, "rows"), (keys, "cols")):
        seen = [0] * len(widths)
        for launch in launches:
            for batch in range(launch.first, launch.first + launch.rows):
                assert launch.num_tiles * getattr(launch.tile, rows_of) >= widths[batch]
                assert not launch.is_whole or launch.num_tiles == 1
                seen[batch] += 1
        unfinished = {
            b for launch in queries if not launch.is_whole for b in range(launch.first, launch.first + launch.rows)
        }
        assert seen == [int(launches is not keys or batch in unfinished) for batch in range(len(widths))]


def problem_on(device: str, **changes) -> Problem:
    values = {"dtype": FP32, "head_size": 8, "value_size": 8, "scale": 1.0} | changes
    return Problem(torch.device(device), **values)


def test_refusals_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = BACKENDS["triton"].why_not
    assert why_not(problem_on("cpu")) is None  # interpreted
    assert "got torch.float64" in str(why_not(problem_on("cpu", dtype=torch.float64)))
    assert "got 129 in query and key" in str(why_not(problem_on("cpu", head_size=129)))
    assert "got 200 in value" in str(why_not(problem_on("cpu", value_size=200)))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "it needs a CUDA device, got cpu" in str(why_not(problem_on("cpu")))
    monkeypatch.setattr("randbatch.kernels.triton._IS_INSTALLED", False)
    assert "pip install 'randbatch[triton]'" in str(why_not(problem_on("cuda")))
    with pytest.raises(ValueError, match="backend 'triton' cannot be used here: triton is not installed"):
        rb.random_batch_attention(*qkv(9), batch_size=4, backend="triton")


def test_auto_takes_it_first_on_cuda_and_never_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), "sdpa")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert pick_backend("auto", problem_on("cuda")) is BACKENDS[name]
    assert "this device has 7.5" in str(BACKENDS["triton"].why_not(problem_on("cuda")))
    assert pick_backend("auto", problem_on("cpu")) is BACKENDS["sdpa"]


# For a GPU that is not there


@pytest.mark.parametrize("capability", [80, 90])
def test_tiles_compile_without_spills(capability: int) -> None:
    """ptxas and cuobjdump come with triton's wheel; the shared memory is that of the smallest GPU of the kind."""
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script, str(capability)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) > 30
    assert [row for row in rows if row["spilled"]] == []
    assert max(row["shared"] for row in rows) <= {80: 99, 90: 227}[capability] * 1024


# The script for machines that have one


def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[1] / "benchmarks/verify_triton.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)


def test_verification_runs_and_counts() -> None:
    done = verify("--interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "5 of 5 right"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, on which it would take minutes")
def test_verification_says_that_there_is_no_device() -> None:
    done = verify()
    assert (done.returncode, done.stdout) == (2, "no CUDA device: nothing was checked\n")
