"""Linear attention against its formula in float64 logarithms, for numbers of any size."""

import math

import numpy as np
import pytest
import torch
from merging import Listed
from torch import Tensor

import randbatch as rb
from randbatch.interactions import Linear, Options
from randbatch.interactions.rounds import Projections, merge_rounds


def by_formula(query: Tensor, key: Tensor, value: Tensor, met: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention and log of its denominator by a log-sum-exp over tokens and dimensions, in float64."""

    def log_map(x: Tensor) -> Tensor:
        x = x.double()
        return torch.where(x > 0, torch.log1p(x.clamp(min=0)), x)

    logits = (log_map(query)[:, None] + log_map(key)[None]).logsumexp(dim=-1)  # [i, j, h]
    if met is not None:
        logits = logits.masked_fill(~met[:, :, None], -torch.inf)
    return torch.einsum("ijh,jhe->ihe", logits.softmax(dim=1), value.double()), logits.logsumexp(dim=1)


def in_long_doubles(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The same in numpy's longest numbers: 64 bits of mantissa on x86, where float64 has 53."""

    def log_map(x: Tensor) -> np.ndarray:
        long = x.double().numpy().astype(np.longdouble)
        return np.where(long > 0, np.log1p(np.maximum(long, 0)), long)

    terms = log_map(query)[:, None] + log_map(key)[None]  # [i, j, h, d]
    top = terms.max(axis=(1, 3), keepdims=True)
    weights = np.exp(terms - top).sum(axis=3)
    total = weights.sum(axis=1)
    out = np.einsum("ijh,jhe->ihe", weights, value.double().numpy()) / total[..., None]
    log_norm = np.log(total) + top[:, 0, :, 0]
    return torch.from_numpy(out.astype(np.float64)), torch.from_numpy(log_norm.astype(np.float64))


def attend(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    return rb.random_batch_attention(query, key, value, interaction="linear", **{"batch_size": len(query), **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("query_at", [-1e4, -200.0, -20.0, -1.0, 0.0, 1.0, 200.0, 1e4])
@pytest.mark.parametrize("key_at", [-1e4, -200.0, -20.0, 0.0, 20.0, 1e4])
def test_numbers_of_any_size(dtype: torch.dtype, query_at: float, key_at: float) -> None:
    query, key = (torch.randn(20, 2, 4).mul(2).add(at).to(dtype) for at in (query_at, key_at))
    value = torch.randn(20, 2, 3).to(dtype)
    want, log_norm = in_long_doubles(query, key, value)
    out = attend(query, key, value)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=4 * eps, atol=8 * eps)
    found = total_weight(query, key, value, rb.random_partition(20, 20))
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(found.double(), log_norm, rtol=4 * wide, atol=8 * wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_of_all_sizes_at_once(dtype: torch.dtype) -> None:
    sizes = 10.0 ** torch.linspace(-3, 4, 60)
    query, key = (torch.randn(60, 2, 4) * sizes[torch.randperm(60), None, None] for _ in range(2))
    value = torch.randn(60, 2, 3)
    inputs = [x.to(dtype) for x in (query, key, value)]
    # a sum of logarithms of 1e4 is known to eps · 1e4
    torch.testing.assert_close(
        attend(*inputs).double(), by_formula(*inputs)[0], rtol=0, atol=1e5 * torch.finfo(dtype).eps
    )


def test_numbers_whose_products_overflow() -> None:
    query, key = (10 ** (36 * torch.rand(20, 2, 4)) for _ in range(2))
    value = torch.randn(20, 2, 3)
    torch.testing.assert_close(
        attend(query, key, value).double(), by_formula(query, key, value)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("at", [-1e4, -200.0, -20.0, 0.0, 20.0])
@pytest.mark.parametrize("rounds", [1, 3])
def test_gradients(at: float, rounds: int) -> None:
    inputs = [torch.randn(12, 1, 3, dtype=torch.float64) for _ in range(3)]
    inputs[0] += at
    inputs[1] += at
    inputs = [x.requires_grad_() for x in inputs]
    met = torch.eye(12, dtype=torch.bool)
    for part in rb.orthogonal_partitions(12, 4, rounds, seed=0) if rounds > 1 else [rb.random_partition(12, 4)]:
        for block in part.split(part.order):
            for row in block:
                met[row[:, None], row] = True
    out = in_rounds(*inputs, rounds=rounds)
    want = by_formula(*inputs, met)[0]
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(want)
    found, expected = (torch.autograd.grad((y * weight).sum(), inputs) for y in (out, want))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def in_rounds(query: Tensor, key: Tensor, value: Tensor, rounds: int) -> Tensor:
    """Attention over the rounds of seed 0."""
    if rounds == 1:
        return attend(query, key, value, batch_size=4, seed=0)
    parts = Listed(rb.orthogonal_partitions(len(query), 4, rounds, seed=0))
    return merge_rounds(Linear(), Projections((query, key, value)), parts, 0.0, Options())


def total_weight(query: Tensor, key: Tensor, value: Tensor, part: rb.Partition) -> Tensor:
    """The logarithm of the denominator, of the others and of the token itself together."""
    linear, inputs = Linear(), (query, key, value)
    found = linear.others(part, inputs, Options()).merge(linear.alone(part, inputs, Options())).log_norm
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounds_keep_the_dtype(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(24, 2, 4).to(dtype) for _ in range(3))
    out = in_rounds(query, key, value, rounds=100)  # all there are: every pair has met
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), by_formula(query, key, value)[0], rtol=20 * eps, atol=20 * eps)


def test_the_gradient_at_zero_is_that_of_elu() -> None:
    """φ has slope 1 from both sides."""
    inputs = [torch.zeros(5, 1, 3, dtype=torch.float64), torch.zeros(5, 1, 3, dtype=torch.float64)]
    inputs.append(torch.randn(5, 1, 3, dtype=torch.float64))
    inputs = [x.requires_grad_() for x in inputs]

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        maps = [torch.nn.functional.elu(x) + 1 for x in (query, key)]
        weights = torch.einsum("ihd,jhd->ijh", *maps)
        return torch.einsum("ijh,jhe->ihe", weights / weights.sum(dim=1, keepdim=True), value)

    found, expected = (torch.autograd.grad(f(*inputs).sin().sum(), inputs) for f in (attend, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_what_is_no_number_stays_in_its_batch_or_its_row() -> None:
    query, key, value = torch.randn(3, 40, 1, 4).unbind()
    part = rb.random_partition(40, 8, seed=0)
    mates = part.split(part.order)[0][1]
    one = int(mates[3])
    for tensor, spoilt in ((query, [one]), (key, mates.tolist()), (value, mates.tolist())):
        keep = tensor[one].clone()
        tensor[one] = math.nan
        out = attend(query, key, value, partition=part, batch_size=8).isnan().any(dim=2).any(dim=1)
        assert out.nonzero().flatten().tolist() == sorted(spoilt)
        tensor[one] = keep
