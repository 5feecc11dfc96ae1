"""What every rule of `convert` must show: the random batch path runs, and one batch is the unconverted model."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import randbatch as rb
from randbatch.execution import Call
from randbatch.nn.config import config_of

ONE_BATCH = 10**6
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


class Calls:
    """How often partitions were drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        draw = Call.draw

        def counted(*args, **kwargs):
            self.count += 1
            return draw(*args, **kwargs)

        monkeypatch.setattr(Call, "draw", counted)


def outputs_and_gradients(model: nn.Module, call: Callable[[nn.Module], Tensor], grad: bool) -> list[Tensor]:
    """The output, and the gradients of all parameters that have one."""
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        out = call(model)
    if not grad:
        return [out]
    model.zero_grad()
    out.sin().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def check(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], nn.Module],
    call: Callable[[nn.Module], Tensor],
    *,
    modules: int,
    batch_size: int = 8,
    random: bool = True,
) -> rb.ConversionReport:
    """`call(model)` before and after, in train and eval, with and without gradients; `modules` is how many attend.

    `call` makes its inputs in the model's dtype. `make` must have no dropout: its masks would be drawn elsewhere.
    """
    original = make().double()
    for parameter in original.parameters():  # no zero biases, no unit scales
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    calls = Calls(monkeypatch)
    report = rb.convert(copy.deepcopy(original), ONE_BATCH)
    for training in (True, False):
        for grad in (True, False):
            reference = copy.deepcopy(original).train(training)
            want = outputs_and_gradients(reference, call, grad)
            model = copy.deepcopy(original).train(training)
            report = rb.convert(model, ONE_BATCH)
            assert all(module.training is training for module in model.modules())
            calls.count = 0
            got = outputs_and_gradients(model, call, grad)
            assert calls.count == modules, f"random batches ran {calls.count} times, not {modules}"
            torch.testing.assert_close(got, want, **FLOAT64)
            _check_float32(original, call, want, training, grad)
            if random:
                _check_random(original, call, want[0], training, grad, batch_size)
    return report


def _check_float32(original: nn.Module, call, want: list[Tensor], training: bool, grad: bool) -> None:
    """The converted model's rounding error is not above twice that of the unconverted one, or of the plain formula.

    Of one small draw torch's fused attention may by luck err half as much as the formula does. Some gradients are zero
    but for rounding (a key's bias shifts all logits of a row), so the unit in the last place of the largest
    one is allowed to each.
    """
    reference = copy.deepcopy(original).float().train(training)
    model = copy.deepcopy(original).float().train(training)
    rb.convert(model, ONE_BATCH)
    formula = copy.deepcopy(model)
    for sampling in filter(None, map(config_of, formula.modules())):
        sampling.backend = "reference"
    theirs, ours, plain_ones = (outputs_and_gradients(m, call, grad) for m in (reference, model, formula))
    noise = torch.finfo(torch.float32).eps * max(exact.norm() for exact in want)
    for exact, random, *others in zip(want, ours, theirs, plain_ones, strict=True):
        assert (random - exact).norm() <= 2 * max((other - exact).norm() for other in others) + noise


def _check_random(original: nn.Module, call, want: Tensor, training: bool, grad: bool, batch_size: int) -> None:
    """Small batches give something else, which eval repeats and training does not."""
    model = copy.deepcopy(original).train(training)
    rb.convert(model, batch_size)
    with torch.set_grad_enabled(grad):
        first, second = call(model), call(model)
    assert first.isfinite().all()
    assert not torch.allclose(first, want)
    assert torch.equal(first, second) is not training


PADDING = torch.arange(11) >= torch.tensor([11, 4, 7]).unsqueeze(1)


def make_input(model: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, 16, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)


def encoder(layers: int = 2, **options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not options.get("norm_first", False))


class HandWritten(nn.Module):
    """Attention as one finds it in repositories."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.mT / 2, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.q(x).sigmoid(), self.k(x).sigmoid(), self.v(x)
        return q @ (k.mT @ v) / (q @ k.sum(1).unsqueeze(2))


class CallsSDPA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, **options) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


@rb.convert.register(HandWritten)
def _attend(module: HandWritten, batches: rb.conversion.RandomBatches, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (4, 4)) for f in (module.q, module.k, module.v))
    return module.out(batches.attend(q, k, v).flatten(-2))


@rb.convert.register(Linear)
def _apply(module: Linear, batches: rb.conversion.RandomBatches, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return batches.apply(batches.forward, x, mask=mask)


rb.convert.register(CallsSDPA)(rb.convert.through_sdpa)
