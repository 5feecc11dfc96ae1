"""What a graph gets from the corrected estimator depends on no other, and is never worse than debiased."""

import math

import pytest
import torch
from torch import Tensor

import randbatch as rb

SIZES = [300, 10, 40, 17, 33, 700, 2, 1]  # in batches of 16: split, whole, and hardly split


def several(*, heads: int = 2, size: int = 8) -> tuple[list[Tensor], Tensor]:
    batch = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    batch = batch[torch.randperm(len(batch))]
    return [torch.randn(len(batch), heads, size, dtype=torch.float64) for _ in range(3)], batch


def corrected(inputs: list[Tensor], batch: Tensor | None, rounds: int = 1, estimator: str = "corrected") -> Tensor:
    options = {"batch_size": 16, "seed": 0, "batch": batch, "rounds": rounds, "estimator": estimator}
    return rb.random_batch_attention(*inputs, **options)


@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_a_graph_among_others_gets_what_it_gets_alone(rounds: int) -> None:
    inputs, batch = several()
    inputs = [x.requires_grad_() for x in inputs]
    together, weight = corrected(inputs, batch, rounds), torch.randn(len(batch), 2, 8, dtype=torch.float64)
    grads = torch.autograd.grad((together * weight).sum(), inputs)
    for number, size in enumerate(SIZES):
        own = batch == number
        alone = [x.detach()[own].requires_grad_() for x in inputs]
        out = corrected(alone, None, rounds)
        torch.testing.assert_close(out, together[own], rtol=1e-9, atol=1e-10, msg=f"a graph of {size}")
        found = torch.autograd.grad((out * weight[own]).sum(), alone)
        torch.testing.assert_close(list(found), [grad[own] for grad in grads], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rounds", [1, 3])
def test_other_graphs_may_hold_anything(rounds: int) -> None:
    inputs, batch = several()
    want = corrected(inputs, batch, rounds)
    for change in (1e3, 1e-3, math.nan, math.inf):
        changed = [torch.where((batch == 5)[:, None, None], x * change, x) for x in inputs]
        out = corrected(changed, batch, rounds)
        torch.testing.assert_close(out[batch != 5], want[batch != 5], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_goes_where_the_plain_formula_takes_it(which: int, rounds: int) -> None:
    """A query spoils its own row, a key or a value those that meet it, and no other head."""
    inputs, batch = several()
    inputs[which][int((batch == 5).nonzero()[7]), 0] = math.nan
    out, plain = (corrected(inputs, batch, rounds, name).isnan() for name in ("corrected", "plain"))
    assert torch.equal(out, plain)
    assert plain.any(dim=2).sum() == 1 or which > 0


@pytest.mark.parametrize("rounds", [1, 2])
def test_an_infinite_mean_field_is_not_taken(rounds: int) -> None:
    """float32 whose products overflow: attention is finite, covariances are not."""
    query, key, value = torch.randn(3, 200, 1, 4).unbind()
    inputs = [x.requires_grad_() for x in (query * 1e-22, key * 1e22, value * 1e22)]
    out = corrected(inputs, None, rounds)
    torch.testing.assert_close(out, corrected(inputs, None, rounds, "debiased"))
    assert out.isfinite().all()
    value_grad = torch.autograd.grad(out.sum(), inputs)[2]
    assert value_grad.isfinite().all()


def kinds(num_tokens: int, size: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Soft, heavy-tailed, clustered, self-similar, of low rank, shifted, equal: `[N, 1, D]` each."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    project = [normal(size, size) / size**0.5 for _ in range(3)]
    flat = normal(num_tokens, size)
    clusters = normal(12, size)[torch.arange(num_tokens) % 12] + 0.4 * normal(num_tokens, size)
    heavy = flat / (normal(num_tokens, 1).abs() + 0.05)
    found = {
        "gauss": (flat @ project[0], flat @ project[1], flat @ project[2]),
        "clusters": (clusters @ project[0], clusters @ project[1], clusters @ project[2]),
        "alike": (clusters @ project[0], clusters @ project[0], clusters @ project[2]),
        "itself": (flat, flat, flat),
        "heavy": (heavy @ project[0], heavy @ project[1], heavy @ project[2]),
        "heavy values": (flat @ project[0], flat @ project[1], heavy @ project[2]),
        "low rank": (flat[:, :2] @ project[0][:2], flat @ project[1], flat @ project[2]),
        "shifted": (flat + 1, flat + 1, flat + 3),
        "equal keys": (flat, torch.ones_like(flat), flat + 0.3),
        "equal values": (flat, flat, torch.ones_like(flat)),
        "one number": (flat, flat, (flat[:, :1] > 2).to(flat)),
    }
    return {name: tuple(x.unsqueeze(1) for x in inputs) for name, inputs in found.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 3e3, 1e6])
def test_never_worse_than_debiased(dtype: torch.dtype, scale: float) -> None:
    """Query and key of any size, in every dtype, in one graph and in four of unlike size."""
    batch = torch.tensor([0] * 40 + [1] * 90 + [2] * 120 + [3] * 150)
    for name, (query, key, value) in kinds(400, 8).items():
        inputs = [x.to(dtype) for x in (scale * query, scale * key, (1000 if dtype == torch.float16 else 1) * value)]
        if not all(bool(x.isfinite().all()) for x in inputs):
            continue  # float16 ends at 65504
        for graphs in (None, batch):
            exact = rb.full_attention(*(x.double() for x in inputs), batch=graphs)
            squared = {"corrected": 0.0, "debiased": 0.0}
            for estimator in squared:
                for seed in range(2):
                    out = rb.random_batch_attention(
                        *inputs, batch_size=32, seed=seed, estimator=estimator, batch=graphs
                    ).double()
                    squared[estimator] += float((out - exact).square().sum() / exact.square().sum()) / 2
            ours, theirs = math.sqrt(squared["corrected"]), math.sqrt(squared["debiased"])
            assert ours <= 1.05 * theirs + 2 * torch.finfo(dtype).eps, (name, graphs is None, ours, theirs)


def test_many_small_graphs_are_corrected_too() -> None:
    """2000 graphs in one call, each as if alone, and nearer to exact attention."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 40, (2000,), generator=generator)
    batch = torch.arange(2000).repeat_interleave(sizes)
    inputs = [torch.randn(len(batch), 1, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    exact = rb.full_attention(*inputs, batch=batch)
    out, debiased = (corrected(inputs, batch, 1, name) for name in ("corrected", "debiased"))
    assert (out - exact).norm() < 0.6 * (debiased - exact).norm()
    for number in (0, 77, 1999):
        own = batch == number
        torch.testing.assert_close(out[own], corrected([x[own] for x in inputs], None), rtol=1e-9, atol=1e-10)


def test_second_derivatives_and_transforms_are_refused() -> None:
    inputs = [torch.randn(40, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for rounds in (1, 2):
        with pytest.raises(NotImplementedError, match="estimator 'corrected' has first derivatives only"):
            torch.autograd.grad(corrected(inputs, None, rounds).square().sum(), inputs, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot run inside"):
            torch.func.grad(lambda x, rounds=rounds: corrected([x, x, x], None, rounds).sum())(inputs[0])
    whole = rb.random_batch_attention(*inputs, batch_size=40, estimator="corrected")  # full attention has them all
    torch.autograd.grad(whole.square().sum(), inputs, create_graph=True)
