"""The Triton backend, interpreted on the CPU, against the formula on the whole matrix in float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fusing import BF16, FP16, FP32, assert_as_good, bias_of, dense, qkv, run
from torch import Tensor

import randbatch as rb
from randbatch.kernels import BACKENDS, Problem, pick_backend
from randbatch.kernels.triton.ops import OPERATORS
from randbatch.kernels.triton.tiles import backward_launches, forward_launches
from randbatch.partition.orthogonal import draw_rounds

pytest.importorskip("triton", reason="the Triton backend is tested where triton is installed")


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


def test_empty() -> None:
    assert rb.random_batch_attention(*qkv(0, value_size=5), batch_size=4, backend="triton").shape == (0, 2, 5)
    none = torch.zeros(0, dtype=torch.int64)
    out, lse = OPERATORS.attend(*qkv(0, value_size=5), none, none, none, [], None, None, 1.0, 0.0)
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


def test_dropout_does_not_depend_on_the_tiles() -> None:
    """The same pair of tokens has the same fate in batches of other sizes."""
    query, key, _ = qkv(64)
    units = torch.eye(64).unsqueeze(1).expand(-1, 2, -1)
    masks = []
    small = rb.random_partition(64, 16, seed=0)
    for part in (small, rb.random_partition(64, 64, seed=0)):
        torch.manual_seed(5)
        options = {"partition": part, "dropout_p": 0.3, "backend": "triton"}
        masks.append((rb.random_batch_attention(query, key, units, **options) > 0).transpose(0, 1))
    meets = bias_of([small]) > -torch.inf
    assert torch.equal(masks[0][:, meets], masks[1][:, meets])


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


def test_auto_says_how_to_ask_for_it_and_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels were interpreted only: until they ran on a GPU, `"auto"` is torch's own attention there."""
    monkeypatch.setattr("randbatch.kernels._said", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_backend("auto", problem_on("cuda")) is BACKENDS["sdpa"]  # it could not: nothing to say
    assert "this device has 7.5" in str(BACKENDS["triton"].why_not(problem_on("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match="backend='triton'"):
        assert pick_backend("auto", problem_on("cuda")) is BACKENDS["sdpa"]
    assert pick_backend("auto", problem_on("cuda")) is BACKENDS["sdpa"]  # said once
    assert pick_backend("triton", problem_on("cuda")) is BACKENDS["triton"]
    assert pick_backend("auto", problem_on("cpu")) is not BACKENDS["triton"]


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
