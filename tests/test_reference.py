"""The reference backend, function by function, against the formula in float64; what a problem says of itself."""

import math
from dataclasses import replace

import pytest
import torch
from fusing import bias_of, dense
from torch import Tensor

import randbatch as rb
from randbatch.kernels import BACKENDS, Problem

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def qkv(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(num_tokens, 2, size, dtype=torch.float64).to(dtype) for size in (8, 8, 5)]


@pytest.mark.parametrize(
    ("dtype", "autocast"), [*((dtype, False) for dtype in DTYPES), (torch.float32, True), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("shared", [False, True])
def test_the_reference_step_by_step(dtype: torch.dtype, autocast: bool, shared: bool) -> None:
    """Each function of the backend against the formula in float64, own logits shifted; no sum is rounded to `dtype`."""
    part = rb.random_partition(13, 4, seed=2)  # one batch of 4, three of 3
    query, key, value = qkv(13, dtype)
    shift = [torch.randn(1 if shared else rows, 2, dtype=torch.float64) for rows, _ in part.groups]
    reference = BACKENDS["reference"]
    problem = Problem(query.device, dtype, 8, 5, 0.3, need_lse=True)
    wide = torch.promote_types(dtype, torch.float32)
    sums = 32 * torch.finfo(wide).eps  # of at most 8 products each, three deep
    close = {"rtol": torch.finfo(dtype).eps + sums, "atol": torch.finfo(dtype).tiny + sums}
    own = part.unpack(torch.cat([each.expand(rows, -1).repeat_interleave(width, 0)
                                 for each, (rows, width) in zip(shift, part.groups, strict=True)]))  # fmt: skip
    for shifts, bias in ((None, torch.zeros_like(own)), (shift, own)):
        leaves = [x.double().requires_grad_() for x in (query, key, value)]
        out, lse = dense(leaves[0] * 0.3 * math.sqrt(8), *leaves[1:], bias_of([part]) + torch.diag_embed(bias.T))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = [reference.attend(query, key, value, part, problem, shifts)]
            if shifts is None:
                found.append(reference.forward(query, key, value, part, problem))
        for mine, log_norm in found:
            assert mine.dtype == dtype
            assert log_norm.dtype == wide
            torch.testing.assert_close(mine.double(), out, **close)
            torch.testing.assert_close(log_norm.double(), lse, rtol=sums, atol=sums)
    assert reference.attend(query, key, value, part, replace(problem, need_lse=False), None)[1] is None
    grad = torch.randn(13, 2, 5).to(dtype)
    out, lse = dense(leaves[0] * 0.3 * math.sqrt(8), *leaves[1:], bias_of([part]))
    wanted = torch.autograd.grad((out * grad).sum(), leaves)
    grads = tuple(torch.full_like(x, torch.nan) for x in (query, key, value))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        reference.backward(grad, query, key, value, out.detach().to(wide), lse.detach().to(wide), part, problem, grads)
    for mine, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine.double(), right, **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_of_one_that_leave_themselves_out(dtype: torch.dtype) -> None:
    part = rb.Partition(torch.tensor([2, 0, 1]), ((1, 2), (1, 1)))
    inputs = qkv(3, dtype)
    reference = BACKENDS["reference"]
    problem = Problem(inputs[0].device, dtype, 8, 5, 0.3, need_lse=True, exclude_self=True)
    for out, lse in (reference.attend(*inputs, part, problem, None), reference.forward(*inputs, part, problem)):
        assert out.dtype == dtype
        assert lse.dtype == torch.promote_types(dtype, torch.float32)
        assert not out[1].any()
        assert lse[1].isneginf().all()
        torch.testing.assert_close(out[[0, 2]], inputs[2][[2, 0]])  # of two each meets the other
    grads = tuple(torch.full_like(x, torch.nan) for x in inputs)
    reference.backward(torch.ones_like(out), *inputs, out, lse, part, problem, grads)
    assert all(not each[1].any() for each in grads)
    assert grads[2][[0, 2]].eq(1).all()
    alone = rb.Partition(torch.arange(3), ((3, 1),))
    assert reference.forward(*inputs, alone, problem)[1].dtype == torch.promote_types(dtype, torch.float32)


def test_only_plain_torch_passes_through_transforms() -> None:
    plain = Problem.of(*(torch.zeros(4, 2, 16) for _ in range(2)), None)
    told: list[Problem] = []
    torch.func.vmap(lambda x: told.append(Problem.of(x, x, None)) or x)(torch.zeros(3, 4, 2, 16))
    assert [plain.transformed, *(problem.transformed for problem in told)] == [False, True]
    assert plain.why_not_transformed() is None
    for name, backend in BACKENDS.items():
        reason = backend.why_not(told[0])
        assert reason is None if name == "reference" else "only backend 'reference' is right" in reason


def test_sizes_of_heads_that_a_kernel_takes() -> None:
    problem = Problem(torch.device("cpu"), torch.float32, 16, 16, 1.0)
    for size, fits in ((0, False), (1, True), (16, True), (17, False)):
        for name in ("head_size", "value_size"):
            reason = replace(problem, **{name: size}).why_not_of_size(16)
            assert reason is None if fits else f"1 to 16 numbers, got {size} in" in reason
