"""Columns: hooks, replaced parts, and what else may be going on in the process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from derivatives import check_close, gradients, leaves
from memory import backward
from subjects import MODEL, Subject
from torch import Tensor, nn

import randbatch as rb


def _doubled(out: Any) -> Any:
    return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


def forward_hook(subject: Subject) -> None:
    """A forward hook that doubles the output, and a forward pre-hook that sees the call."""
    for training in (True, False):
        module, inputs, seen = subject.module().train(training), subject.inputs(), []
        module.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.append(1), with_kwargs=True)
        module.register_forward_hook(lambda m, a, out: _doubled(out))
        torch.manual_seed(5)
        found = subject.call(module, inputs)
        plain = subject.module().train(training)
        torch.manual_seed(5)
        want = subject.call(plain, inputs)
        torch.testing.assert_close(found, 2 * want)
        assert seen == [1]


def backward_hook(subject: Subject) -> None:
    """A full backward hook is called once, with the gradient of the output; gradients are what they were."""
    for training in (True, False):
        want = gradients(subject, subject.module().train(training), subject.inputs())
        module, inputs, seen = subject.module().train(training), subject.inputs(), []
        module.register_full_backward_hook(lambda m, given, of_out, seen=seen: seen.append(of_out[0]))
        with warnings.catch_warnings():  # torch looks for inputs among the positional arguments only
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            found = gradients(subject, module, inputs)
        check_close(found, want)
        torch.manual_seed(5)
        out = subject.call(module, inputs).detach()
        weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
        assert len(seen) == 1
        torch.testing.assert_close(seen[0].reshape(out.shape), weights * out.cos(), rtol=1e-4, atol=1e-4)


def last_projections(module: nn.Module) -> Iterator[Any]:
    for each in module.modules():
        if isinstance(each, rb.nn.RandomBatchAttention):
            yield each


def _check_doubled_projection(subject: Subject, change: Callable[[Any], object]) -> None:
    """`change` makes the output projection of every attention give twice as much."""
    for training in (True, False):
        module, inputs = subject.module().train(training), subject.inputs()
        for attention in last_projections(module):
            change(attention)
        module.train(training)
        torch.manual_seed(5)
        found = [subject.call(module, inputs)]
        found += torch.autograd.grad(found[0].sin().sum(), inputs)
        plain, exact = subject.module().train(training), subject.inputs()
        for attention in last_projections(plain):
            for parameter in attention.out_proj.parameters():
                parameter.data.mul_(2)
        torch.manual_seed(5)
        want = [subject.call(plain, exact)]
        want += torch.autograd.grad(want[0].sin().sum(), exact)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def hook_of_projection(subject: Subject) -> None:
    """A forward hook on `out_proj`."""
    _check_doubled_projection(subject, lambda m: m.out_proj.register_forward_hook(lambda p, a, out: 2 * out))


def backward_hook_of_projection(subject: Subject) -> None:
    """A full backward hook on `out_proj` that doubles what goes on to the attention."""
    module, inputs = subject.module(), subject.inputs()
    for attention in last_projections(module):
        attention.out_proj.register_full_backward_hook(lambda m, given, of_out: (2 * given[0],))
    found = gradients(subject, module, inputs)[: len(inputs)]
    plain, exact = subject.module(), subject.inputs()

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    for attention in last_projections(plain):
        attention.out_proj.register_forward_pre_hook(lambda m, a: (Doubled.apply(a[0]),))
    check_close(found, gradients(subject, plain, exact)[: len(inputs)])


def replaced_forward(subject: Subject) -> None:
    """`out_proj.forward` replaced on the instance."""

    def change(m: Any) -> None:
        projection = m.out_proj
        projection.forward = lambda x: 2 * F.linear(x, projection.weight, projection.bias)

    _check_doubled_projection(subject, change)


class _Adapted(nn.Module):
    """As low-rank adapters do: around the projection that was there."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + F.linear(x, self.weight, self.bias)


def replaced_projection(subject: Subject) -> None:
    """`out_proj` replaced by a module around it."""
    _check_doubled_projection(subject, lambda m: setattr(m, "out_proj", _Adapted(m.out_proj)))


def threads(subject: Subject) -> None:
    """`torch.set_num_threads` between forward and backward."""
    before = torch.get_num_threads()
    try:
        want = backward(subject.call, subject.module(), subject.inputs())
        found = backward(subject.call, subject.module(), subject.inputs(), lambda: torch.set_num_threads(2))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def inference_first(subject: Subject) -> None:
    """What is remembered of a call under `inference_mode` serves training: partitions, edges, masks."""
    want = backward(subject.call, subject.module().eval(), subject.inputs())
    module, inputs = subject.module().eval(), subject.inputs()
    with torch.inference_mode():
        subject.call(module, inputs)
        if "partition" in subject.traits:
            made: dict[str, Any] = {"partition": rb.random_partition(len(inputs[0]), len(inputs[0]) // 4 + 1)}
        elif subject.group == MODEL:
            assert isinstance(module, rb.models.GraphTransformer)
            made = {"edge_index": module.prepare_edges(subject.more(len(inputs[0]))[0], len(inputs[0]))}
        else:
            made = {}

    def call(module: nn.Module, x: list[Tensor]) -> Tensor:
        if "edge_index" in made:
            return module(x[0], made["edge_index"])
        if "partition" in made:
            return module(*x, **made)
        return subject.call(module, x)

    torch.testing.assert_close(backward(call, module, inputs), want, rtol=1e-5, atol=1e-5)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _inside(context: Callable[[], Any]) -> Callable[[Subject], None]:
    def column(subject: Subject) -> None:
        want = backward(subject.call, subject.module(), subject.inputs())
        with context():
            found = backward(subject.call, subject.module(), subject.inputs())
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)

    return column


@contextmanager
def anomalies() -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(True):
        yield


@contextmanager
def another_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def default_dtype(subject: Subject) -> None:
    """`torch.set_default_dtype(float64)` around tensors and weights of float32."""
    want = backward(subject.call, subject.module(), subject.inputs())
    module, inputs = subject.module(), subject.inputs()
    with another_default():
        found = backward(subject.call, module, inputs)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def without_gradients(subject: Subject) -> None:
    """`no_grad` and `inference_mode`: the output of a call that records."""
    for training in (True, False):
        module, inputs = subject.module().train(training), subject.inputs()
        torch.manual_seed(5)
        want = subject.call(module, inputs).detach()
        for context in (torch.no_grad, torch.inference_mode):
            torch.manual_seed(5)
            with context():
                found = subject.call(module, inputs)
            assert not found.requires_grad
            torch.testing.assert_close(found.clone(), want, rtol=1e-5, atol=1e-5)


def strided(subject: Subject) -> None:
    """Inputs, and gradients that come in, that are not contiguous."""
    for training in (True, False):
        want = gradients(subject, subject.module().train(training), subject.inputs())
        module, inputs = subject.module().train(training), subject.inputs()
        spread = [torch.stack([x, x], dim=-1).detach()[..., 1].requires_grad_() for x in inputs]
        assert not spread[0].is_contiguous()
        torch.manual_seed(5)
        out = subject.call(module, spread)
        weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
        loss = (weights.mT.contiguous().mT * out.sin()).mT.sum()
        found = torch.autograd.grad(loss, leaves(module, spread), allow_unused=True, materialize_grads=True)
        check_close(found, want)


COLUMNS_OF_ALL = {
    "inference_mode first": inference_first,
    "set_num_threads between": threads,
    "detect_anomaly": _inside(anomalies),
    "deterministic algorithms": _inside(deterministic),
    "default dtype float64": default_dtype,
    "no_grad, inference_mode": without_gradients,
    "strides": strided,
}
COLUMNS_OF_MODULES = {"forward hook": forward_hook, "backward hook": backward_hook}
COLUMNS_OF_ATTENTION = {
    "out_proj: hook": hook_of_projection,
    "out_proj: backward hook": backward_hook_of_projection,
    "out_proj: forward replaced": replaced_forward,
    "out_proj: replaced": replaced_projection,
}
COLUMNS = COLUMNS_OF_ALL | COLUMNS_OF_MODULES | COLUMNS_OF_ATTENTION
