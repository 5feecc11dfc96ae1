"""Derivatives beyond the first: those of the formula, or a refusal; never the first order alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import randbatch as rb
from randbatch.kernels import BACKENDS

OPTIONS = {
    "plain": {},
    "debiased": {"estimator": "debiased"},
    "rounds": {"rounds": 3},
    "debiased rounds": {"rounds": 3, "estimator": "debiased"},
    "all rounds": {"rounds": 99},
    "linear": {"interaction": "linear"},
    "linear rounds": {"interaction": "linear", "rounds": 2},
    "graphs": {"batch": torch.tensor([0] * 9 + [1] * 1 + [5] * 4)},
    "graphs, rounds": {"batch": torch.tensor([0] * 9 + [1] * 1 + [5] * 4), "rounds": 2},
    "one batch": {"batch_size": 14},
}


def hessian_product(function: Callable[..., Tensor], inputs: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    """`Σ ∂²f/∂x∂y · v`, as autograd gives it."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
    dot = sum((grad * v).sum() for grad, v in zip(grads, along, strict=True))
    return list(torch.autograd.grad(dot, inputs, allow_unused=True, materialize_grads=True))


def by_differences(function: Callable[..., Tensor], inputs: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    """The same from central differences of the first gradient, in float64."""

    def gradient(step: float) -> tuple[Tensor, ...]:
        moved = [(x.double() + step * v.double()).requires_grad_() for x, v in zip(inputs, along, strict=True)]
        return torch.autograd.grad(function(*moved), moved)

    return [(a - b) / 2e-5 for a, b in zip(gradient(1e-5), gradient(-1e-5), strict=True)]


def far(found: list[Tensor], want: list[Tensor]) -> float:
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        for a, b in zip(found, want, strict=True)
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_of_the_op(backend: str, options: dict) -> None:
    if options.get("interaction") == "linear" and backend != "auto":
        return  # it has one implementation, and says so
    inputs = [torch.randn(14, 2, 4) for _ in range(3)]
    along = [torch.randn(14, 2, 4) for _ in range(3)]
    options = {"batch_size": 5, "seed": 0} | options

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        used = backend if query.dtype == torch.float32 else "auto"
        return rb.random_batch_attention(query, key, value, backend=used, **options).sin().sum()

    assert far(hessian_product(function, inputs, along), by_differences(function, inputs, along)) < 1e-4


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradgradcheck(options: dict) -> None:
    inputs = [torch.randn(14, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    options = {"batch_size": 5, "seed": 0} | options
    assert torch.autograd.gradgradcheck(lambda *x: rb.random_batch_attention(*x, **options), inputs)


def test_of_exact_attention() -> None:
    inputs = [torch.randn(20, 2, 4) for _ in range(3)]
    along = [torch.randn(20, 2, 4) for _ in range(3)]
    for chunk in (None, 7):

        def function(*qkv: Tensor, chunk_size: int | None = chunk) -> Tensor:
            return rb.full_attention(*qkv, chunk_size=chunk_size).sin().sum()

        assert far(hessian_product(function, inputs, along), by_differences(function, inputs, along)) < 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_size", [4, 30])
def test_of_the_layer(batch_size: int, bias: bool) -> None:
    """Through the function that projects, attends and projects; by the input and by every parameter."""
    layer = rb.nn.RandomBatchAttention(8, 2, batch_size, bias=bias).eval()
    x = torch.randn(21, 8)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    along = [torch.randn_like(tensor) for tensor in (x, *parameters)]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return (x + torch.func.functional_call(layer, named, (x,))).sin().sum()

    inputs = [x, *(p.detach() for p in parameters)]
    assert far(hessian_product(function, inputs, along), by_differences(function, inputs, along)) < 1e-4


def test_meta_learning_step() -> None:
    """The loss after one step, differentiated by the parameters before it; float64 by the reference judges."""

    def gradient(layer: nn.Module, x: Tensor) -> list[Tensor]:
        parameters = dict(layer.named_parameters())
        loss = torch.func.functional_call(layer, parameters, (x,)).square().sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        moved = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
        after = torch.func.functional_call(layer, moved, (x,)).sin().sum()
        return list(torch.autograd.grad(after, list(parameters.values())))

    layer = rb.nn.RandomBatchAttention(8, 2, 4, seed=3).eval()
    judge = rb.nn.RandomBatchAttention(8, 2, 4, seed=3, backend="reference", dtype=torch.float64).eval()
    judge.load_state_dict(layer.state_dict())
    x = torch.randn(15, 8)
    assert far(gradient(layer, x), gradient(judge, x.double())) < 1e-5


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"chunk_batches": 2}, "chunk_batches has first derivatives only"),
        ({"chunk_batches": 2, "rounds": 2}, "chunk_batches has first derivatives only"),
        ({"estimator": "corrected"}, "corrected.* has first derivatives only"),
    ],
)
def test_what_is_not_offered_raises(options: dict, why: str) -> None:
    inputs = [torch.randn(40, 2, 4) for _ in range(3)]

    def function(*qkv: Tensor) -> Tensor:
        return rb.random_batch_attention(*qkv, batch_size=5, seed=0, **options).sin().sum()

    with pytest.raises(NotImplementedError, match=why):
        hessian_product(function, inputs, inputs)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_fused_dropout_raises(backend: str) -> None:
    inputs = [torch.randn(14, 2, 4) for _ in range(3)]

    def function(*qkv: Tensor) -> Tensor:
        return rb.random_batch_attention(*qkv, batch_size=5, seed=0, dropout_p=0.2, backend=backend).sin().sum()

    if BACKENDS[backend].why_not(rb.kernels.Problem.of(inputs[0], inputs[2], None)) is not None:
        pytest.skip(f"{backend} is not to be had here")
    with pytest.raises(NotImplementedError, match="dropout"):
        hessian_product(function, inputs, inputs)


FORWARD = {name: options for name, options in OPTIONS.items() if name != "linear rounds"}


@pytest.mark.parametrize("options", FORWARD.values(), ids=FORWARD)
def test_forward_mode(options: dict) -> None:
    """`jvp`, and dual numbers without torch.func: the directional derivative that backward gives."""
    inputs = tuple(torch.randn(14, 2, 4) for _ in range(3))
    along = tuple(torch.randn(14, 2, 4) for _ in range(3))
    options = {"batch_size": 5, "seed": 0} | options

    def function(*qkv: Tensor) -> Tensor:
        return rb.random_batch_attention(*qkv, **options).sin().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(function(*leaves), leaves)
    want = sum((grad * v).sum() for grad, v in zip(grads, along, strict=True))
    torch.testing.assert_close(torch.func.jvp(function, inputs, along)[1], want, rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, v) for x, v in zip(inputs, along, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
    torch.testing.assert_close(tangent, want, rtol=1e-4, atol=1e-4)


def test_forward_mode_by_a_kernel_is_refused() -> None:
    inputs = tuple(torch.randn(14, 2, 4) for _ in range(3))
    with pytest.raises(ValueError, match="only backend 'reference'"):
        torch.func.jvp(
            lambda *qkv: rb.random_batch_attention(*qkv, batch_size=5, seed=0, backend="sdpa"), inputs, inputs
        )


def test_gradients_of_each_sample() -> None:
    layer = rb.nn.RandomBatchAttention(8, 2, 4).eval()
    parameters = dict(layer.named_parameters())
    samples = torch.randn(5, 15, 8)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for number, x in enumerate(samples):
        want = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        for name, grad in zip(parameters, want, strict=True):
            torch.testing.assert_close(found[name][number], grad, rtol=1e-4, atol=1e-5)
    layer.train()
    with pytest.raises(NotImplementedError, match="randomness='same'"):
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, samples)
