"""`chunk_batches` differentiates by all that a module depends on; the same without chunks is the oracle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import randbatch as rb

Make = Callable[..., tuple[nn.Module, dict[str, Tensor]]]


def layer(chunk: int | None, **options: object) -> rb.nn.RandomBatchAttention:
    torch.manual_seed(1)
    return rb.nn.RandomBatchAttention(8, 2, 4, seed=3, chunk_batches=chunk, **options).double()


def wrapper(chunk: int | None, inner: nn.Module) -> rb.nn.RandomBatch:
    return rb.nn.RandomBatch(inner.double(), 4, seed=3, chunk_batches=chunk)


def plain(chunk: int | None, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    module = layer(chunk, **options)
    return module, dict(module.named_parameters())


def hypernetwork(chunk: int | None, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """The weight is computed from another, outside of the module."""
    module = layer(chunk, **options)
    w = module.in_proj_weight.detach().clone().requires_grad_()
    del module.in_proj_weight
    module.in_proj_weight = w * 1.5
    return module, {"w": w, **dict(module.named_parameters())}


def weight_norm(chunk: int | None, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    module = layer(chunk, **options)
    parametrizations.weight_norm(module, "in_proj_weight")
    parametrizations.weight_norm(module.out_proj)
    return module, dict(module.named_parameters())


def pruned(chunk: int | None, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    module = layer(chunk, **options)
    prune.l1_unstructured(module, "in_proj_weight", amount=0.3)
    return module, dict(module.named_parameters())


def tied(chunk: int | None, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two layers with one weight: the input of the second depends on what the second is differentiated by."""
    first, second = layer(chunk, **options), layer(chunk, **options)
    second.in_proj_weight = first.in_proj_weight
    return nn.Sequential(first, second), {"w": first.in_proj_weight, "o": second.out_proj.weight}


class Experts(nn.Module):
    """Which parameters are used depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.sum().abs() * 10) % 3](x)


def experts(chunk: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    module = wrapper(chunk, Experts())
    return module, dict(module.named_parameters())


def inside_weight_norm(chunk: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(1)
    inner = nn.Linear(8, 8).double()
    torch.nn.utils.weight_norm(inner)
    module = wrapper(chunk, inner)
    return module, dict(module.named_parameters())


def gradients(make: Make, chunk: int | None, run: Callable[[nn.Module, Tensor], Tensor], **options: object) -> dict:
    module, tensors = make(chunk, **options)
    torch.manual_seed(2)
    x = torch.randn(21, 8, dtype=torch.float64, requires_grad=True)
    out = run(module, x)
    found = torch.autograd.grad(out.sin().sum(), [x, *tensors.values()], allow_unused=True)
    return {"out": out.detach(), **dict(zip(["x", *tensors], found, strict=True))}


def same(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        if tensor is None:  # an expert that was not asked
            assert found[name] is None or not found[name].any()
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("make", [plain, hypernetwork, weight_norm, pruned, tied])
def test_whatever_weights_are(make: Make, rounds: int) -> None:
    for seed_of_training in (0, 1):

        def run(module: nn.Module, x: Tensor, seed: int = seed_of_training) -> Tensor:
            torch.manual_seed(seed)
            return module(x)

        same(gradients(make, 2, run, rounds=rounds), gradients(make, None, run, rounds=rounds))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("make", [inside_weight_norm])
def test_modules_inside_the_wrapper(make: Make) -> None:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        return module.eval()(x)

    same(gradients(make, 2, run), gradients(make, None, run))


def test_parameters_that_some_pieces_use() -> None:
    """Every piece has its own expert, so the oracle is one piece at a time by hand."""
    module, tensors = experts(1)
    module.eval()
    x = torch.randn(21, 8, dtype=torch.float64)
    part = rb.random_partition(21, 4, seed=3)
    blocks = [module.module(x[row].unsqueeze(0)) for block in part.split(part.order) for row in block]
    want = torch.autograd.grad(
        sum(b.sin().sum() for b in blocks), list(tensors.values()), allow_unused=True, materialize_grads=True
    )
    found = torch.autograd.grad(module(x).sin().sum(), list(tensors.values()))
    assert sum(bool(grad.any()) for grad in want) > 2
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rounds", [1, 2])
def test_cached_parametrizations(rounds: int) -> None:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        with parametrize.cached():
            return module(x)

    want = gradients(weight_norm, None, lambda m, x: run(m.eval(), x), rounds=rounds)
    same(gradients(weight_norm, 2, lambda m, x: run(m.eval(), x), rounds=rounds), want)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("inside", [True, False])
def test_two_calls_in_one_cache(inside: bool, rounds: int) -> None:
    """The second call meets a weight that the first one made; backward comes inside the cache or after it."""

    def backward(chunk: int | None) -> list[Tensor]:
        module, tensors = weight_norm(chunk, rounds=rounds)
        module.eval()
        torch.manual_seed(2)
        x = torch.randn(21, 8, dtype=torch.float64, requires_grad=True)
        with parametrize.cached():
            loss = (module(x) + module(2 * x)).sin().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [x.grad, *(tensor.grad for tensor in tensors.values())]

    for found, want in zip(backward(2), backward(None), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_under_checkpointing(training: bool, rounds: int, reentrant: bool) -> None:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        module.train(training)
        return checkpoint(module, x * 1.0, use_reentrant=reentrant)

    def backward(chunk: int | None, wrapped: bool) -> list[Tensor]:
        module, tensors = plain(chunk, rounds=rounds, dropout=0.2)
        x = torch.ones(21, 8, dtype=torch.float64).cumsum(0).sin().requires_grad_()
        torch.manual_seed(5)
        out = run(module, x) if wrapped else module.train(training)(x * 1.0)
        out.sin().sum().backward()
        return [x.grad, *(p.grad for p in tensors.values())]

    for found, want in zip(backward(2, True), backward(2, False), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rounds", [1, 2])
def test_offloaded_saved_tensors(rounds: int) -> None:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return module.eval()(x)

    want = gradients(plain, None, lambda m, x: m.eval()(x), rounds=rounds)
    same(gradients(plain, 2, run, rounds=rounds), want)


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_mode_of_forward_is_that_of_backward(rounds: int) -> None:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        out = module(x)
        module.eval()
        return out

    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    found = []
    for change in (False, True):
        module = rb.nn.RandomBatch(inner.double().train(), 4, seed=3, rounds=rounds, chunk_batches=2)
        x = torch.ones(21, 8, dtype=torch.float64).cumsum(0).sin().requires_grad_()
        torch.manual_seed(5)
        out = run(module, x) if change else module(x)
        found.append(torch.autograd.grad(out.sin().sum(), [x, *module.parameters()]))
        assert module.training != change
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_parameters_that_are_others_in_backward_raise(grad: bool, rounds: int) -> None:
    module = layer(2, rounds=rounds)
    other = {name: torch.randn_like(p).requires_grad_(grad) for name, p in module.named_parameters()}
    x = torch.randn(21, 8, dtype=torch.float64, requires_grad=True)
    out = torch.func.functional_call(module, other, (x,))
    with pytest.raises(RuntimeError, match="set chunk_batches to None"):
        out.sum().backward()


def test_a_weight_that_nothing_holds_raises() -> None:
    module = rb.nn.RandomBatch(nn.Identity(), 4, chunk_batches=2)
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    hidden = w * 2
    module.module.forward = lambda x: x * hidden
    with pytest.raises(RuntimeError, match="no attribute of the module holds"):
        module(torch.randn(21, 8, dtype=torch.float64))


def test_transforms_are_refused() -> None:
    module = layer(2)
    with pytest.raises(NotImplementedError, match="chunk_batches cannot run inside"):
        torch.func.grad(lambda x: module(x).sum())(torch.randn(21, 8, dtype=torch.float64))
