"""The layer on a CPU as one function, against the layer's own general way in float64."""

import pytest
import torch
from torch import Tensor, nn

import randbatch as rb
from randbatch.nn import projected


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the one function had."""
    found: list[int] = []

    def counted(x: Tensor, *rest: object) -> Tensor:
        found.append(len(x))
        return projected.attend_projected(x, *rest)

    monkeypatch.setattr("randbatch.nn.attention.attend_projected", counted)
    return found


def run(layer: nn.Module, x: Tensor, **options: object) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    out = layer(leaf, **options)
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)  # nothing cancels
    return [out, *torch.autograd.grad((out * weight).sum(), [leaf, *layer.parameters()])]


@pytest.mark.parametrize("batch", [None, "graphs"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 50, 203])
def test_it_is_the_layer(
    num_tokens: int, bias: bool, batch: str | None, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several pieces, ragged batches; float64 to 1e-12, float32 as exact as the general way in float32."""
    monkeypatch.setattr(projected, "_BYTES", 0)
    monkeypatch.setattr(projected, "_BATCHES", 2)
    graphs = None if batch is None else torch.arange(num_tokens) % 3
    layer = rb.nn.RandomBatchAttention(16, 2, 8, bias=bias).double().eval()
    x = torch.randn(num_tokens, 16, dtype=torch.float64)
    got = run(layer, x, batch=graphs)
    assert calls == [num_tokens]
    layer.randbatch_config.backend = "reference"
    want = run(layer, x, batch=graphs)
    assert calls == [num_tokens]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    layer.float()
    plain = run(layer, x.float(), batch=graphs)
    layer.randbatch_config.backend = "auto"
    for ours, theirs, exact in zip(run(layer, x.float(), batch=graphs), plain, want, strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * exact.norm()
        assert (ours - exact).norm() <= max(2 * (theirs - exact).norm(), floor)


def test_only_what_is_asked_for_is_differentiated(calls: list[int]) -> None:
    layer = rb.nn.RandomBatchAttention(16, 2, 8)
    layer.in_proj_weight.requires_grad_(False)
    layer.out_proj.bias.requires_grad_(False)
    layer(torch.randn(20, 16)).sum().backward()
    given = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert given == {"in_proj_bias", "out_proj.weight"}
    with torch.no_grad():
        assert not layer(torch.randn(20, 16)).requires_grad
    assert calls == [20, 20]


def test_functional_call_and_grad_of_torch_func(calls: list[int]) -> None:
    layer = rb.nn.RandomBatchAttention(16, 2, 8).double().eval()
    x = torch.randn(30, 16, dtype=torch.float64)
    other = {name: torch.randn_like(parameter) for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, x).square().sum()

    grads = torch.func.grad(loss)(other)
    layer.load_state_dict(other)
    layer(x).square().sum().backward()
    assert calls == [30]  # transforms see plain torch
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


def _add_hook(layer: rb.nn.RandomBatchAttention) -> None:
    layer.out_proj.register_forward_hook(lambda module, args, out: 2 * out)


def _replace(layer: rb.nn.RandomBatchAttention) -> None:
    layer.out_proj = nn.Linear(16, 16)


def _parametrise(layer: rb.nn.RandomBatchAttention) -> None:
    nn.utils.parametrizations.weight_norm(layer.out_proj)


def _debias(layer: rb.nn.RandomBatchAttention) -> None:
    layer.randbatch_config.estimator = "debiased"


def _drop(layer: rb.nn.RandomBatchAttention) -> None:
    layer.dropout = 0.5


@pytest.mark.parametrize("change", [_add_hook, _replace, _parametrise, _debias, _drop])
def test_a_layer_that_is_more_goes_the_general_way(change, calls: list[int]) -> None:
    layer = rb.nn.RandomBatchAttention(16, 2, 8)
    change(layer)
    layer(torch.randn(30, 16)).sum().backward()
    assert calls == []


def test_memory_does_not_hold_queries_keys_and_values() -> None:
    """What is kept for backward: input, attention, log-sum-exp, parameters."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    layer = rb.nn.RandomBatchAttention(32, 2, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(torch.randn(1000, 32, requires_grad=True))
    assert sum(sizes) == 1000 * (32 + 32 + 2) + sum(parameter.numel() for parameter in layer.parameters())
