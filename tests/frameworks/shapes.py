"""Columns: tensors without numbers, numbers of other types, and what would write one partition down for ever."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from subjects import Op, Others, P, Subject
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def _moved(others: Others, move: Any) -> Others:
    """Tensors beside the inputs, moved."""

    def of(given: Any) -> Any:
        return move(given) if isinstance(given, Tensor) else given

    return tuple(of(x) for x in others[0]), {key: of(x) for key, x in others[1].items()}


def meta(subject: Subject) -> None:
    """On the meta device: shape and dtype of the output, and a backward pass."""
    for training in (True, False):
        module = subject.module().train(training)
        want = subject.call(module, subject.inputs())
        module = module.to("meta")
        inputs = [x.detach().to("meta").requires_grad_() for x in subject.inputs()]
        out = subject.call(module, inputs, _moved(subject.others(subject.n), lambda x: x.to("meta")))
        assert out.is_meta
        assert (out.shape, out.dtype) == (want.shape, want.dtype)
        out.sum().backward()
        assert inputs[0].grad is not None


def fake(subject: Subject) -> None:
    """In `FakeTensorMode`, as memory planners and exporters use it."""
    for training in (True, False):
        want = subject.call(subject.module().train(training), subject.inputs())
        module = subject.module().train(training)
        mode = FakeTensorMode(allow_non_fake_inputs=False)
        for owner in module.modules():
            for name, tensor in [*owner.named_parameters(recurse=False)]:
                delattr(owner, name)
                owner.register_parameter(name, nn.Parameter(mode.from_tensor(tensor.detach())))
            for name, tensor in [*owner.named_buffers(recurse=False)]:
                delattr(owner, name)
                owner.register_buffer(name, mode.from_tensor(tensor))
        others = _moved(subject.others(subject.n), mode.from_tensor)
        with mode:
            inputs = [torch.empty(shape, requires_grad=True) for shape in subject.shapes(subject.n)]
            out = subject.call(module, inputs, others)
            assert (out.shape, out.dtype) == (want.shape, want.dtype)
            out.sum().backward()
            assert inputs[0].grad is not None


def built_on_meta(subject: Subject) -> None:
    """Built under `torch.device("meta")`, given memory and weights afterwards: the same module."""
    plain = subject.module().eval()
    with torch.device("meta"):
        module = subject.build(P).eval()
    assert all(x.is_meta for x in module.parameters())
    module.to_empty(device="cpu")
    module.load_state_dict(plain.state_dict())
    with warnings.catch_warnings():
        for name, buffer in plain.named_buffers():  # those that are not saved
            module.get_buffer(name).copy_(buffer)
        torch.testing.assert_close(subject.call(module, subject.inputs()), subject.call(plain, subject.inputs()))


def numpys(subject: Subject) -> None:
    """`np.int64` where an int is taken."""
    for training in (True, False):
        plain, module = subject.module().train(training), subject.module(np.int64(P)).train(training)  # type: ignore[arg-type]
        torch.manual_seed(5)
        want = subject.call(plain, subject.inputs())
        torch.manual_seed(5)
        torch.testing.assert_close(subject.call(module, subject.inputs()), want)


class Inputs(nn.Module):
    """A row with nothing but its inputs to give, for those who trace."""

    def __init__(self, subject: Subject, module: nn.Module) -> None:
        super().__init__()
        self.module, self._subject = module, subject
        self._others = subject.others(subject.n)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._subject.call(self.module, list(inputs), self._others)


class Three(nn.Module):
    """The op with three tensors to give."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.function, self.options = op.function, op.options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.function(query, key, value, **self.options)


def traced(subject: Subject) -> None:
    """`torch.jit.trace`."""
    module = Inputs(subject, subject.module().eval())
    inputs = tuple(x.detach() for x in subject.inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.jit.trace(module, inputs, check_trace=False)
    torch.testing.assert_close(found(*inputs), module(*inputs))


def scripted(subject: Subject) -> None:
    """`torch.jit.script`."""
    module = subject.module().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.jit.script(module.function if isinstance(module, Op) else module)
    torch.testing.assert_close(subject.call(found, subject.inputs()), subject.call(module, subject.inputs()))


def symbolic(subject: Subject) -> None:
    """`torch.fx.symbolic_trace`."""
    module = subject.module().eval()
    module = Three(module) if isinstance(module, Op) else module
    found = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(subject.call(found, subject.inputs()), subject.call(module, subject.inputs()))


COLUMNS = {
    "meta tensors": meta,
    "FakeTensorMode": fake,
    "np.int64": numpys,
}
COLUMNS_OF_MODULES = {"built on meta": built_on_meta}
COLUMNS_OF_TRACERS = {"jit.trace": traced, "jit.script": scripted, "fx": symbolic}
