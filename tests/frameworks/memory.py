"""Columns: what trades memory for time, against gradients without it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from derivatives import leaves
from subjects import Subject
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

Call = Callable[[nn.Module, list[Tensor]], Tensor]


def backward(call: Call, module: nn.Module, inputs: list[Tensor], between: Callable[[], object] = int) -> list[Tensor]:
    """Output and gradients by `.backward()`, with something done between forward and backward."""
    torch.manual_seed(5)
    out = call(module, inputs)
    loss = (torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos() * out.sin()).sum()
    after = torch.get_rng_state()
    between()
    loss.backward()
    assert torch.equal(after, torch.get_rng_state()), "backward took random numbers from what comes later"
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves(module, inputs))]


def check_same(subject: Subject, call: Call, between: Callable[[], object] = int) -> None:
    """In train and in eval: the same output and gradients as without."""
    for training in (True, False):
        want = backward(subject.call, subject.module().train(training), subject.inputs())
        found = backward(call, subject.module().train(training), subject.inputs(), between)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def _checkpointed(subject: Subject, use_reentrant: bool) -> None:
    def call(module: nn.Module, inputs: list[Tensor]) -> Tensor:
        def function(*x: Tensor) -> Tensor:
            return subject.call(module, list(x))

        out = checkpoint(function, *inputs, use_reentrant=use_reentrant)
        assert isinstance(out, Tensor)
        return out

    check_same(subject, call)


def checkpoint_plain(subject: Subject) -> None:
    """`torch.utils.checkpoint` with `use_reentrant=False`."""
    _checkpointed(subject, False)


def checkpoint_reentrant(subject: Subject) -> None:
    """`torch.utils.checkpoint` with `use_reentrant=True`."""
    _checkpointed(subject, True)


def saved_elsewhere(subject: Subject) -> None:
    """`torch.autograd.graph.save_on_cpu`: what is saved goes through hooks."""

    def call(module: nn.Module, inputs: list[Tensor]) -> Tensor:
        with save_on_cpu():
            return subject.call(module, inputs)

    check_same(subject, call)


def twice(subject: Subject) -> None:
    """`backward(retain_graph=True)`, and again: the same gradients, with dropout too."""
    for training in (True, False):
        module, inputs = subject.module().train(training), subject.inputs()
        torch.manual_seed(5)
        loss = subject.call(module, inputs).sin().sum()
        wanted = leaves(module, inputs)
        first = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True, retain_graph=True)
        torch.manual_seed(8)
        again = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(again, first, rtol=1e-6, atol=1e-6)


COLUMNS = {
    "checkpoint": checkpoint_plain,
    "reentrant checkpoint": checkpoint_reentrant,
    "save_on_cpu": saved_elsewhere,
    "backward twice": twice,
}
