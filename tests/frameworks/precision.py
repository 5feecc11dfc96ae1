"""Columns: autocast and half precision. The judges are torch's own modules under autocast, and float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from derivatives import leaves
from subjects import CONVERTED, FULL, LAYER, OP, WRAPPER, C, H, Subject
from torch import Tensor, nn

from randbatch.nn import RandomBatch

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def torchs_dtype(subject: Subject, dtype: torch.dtype, inputs: list[Tensor], training: bool) -> torch.dtype:
    """What torch's own module gives under autocast: SDPA, `MultiheadAttention`, the module inside, or unconverted."""
    with torch.autocast("cpu", dtype):
        if subject.group in (OP, FULL):
            return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in inputs)).dtype
        if subject.group == LAYER:
            return nn.MultiheadAttention(C, H)(inputs[0], inputs[0], inputs[0])[0].dtype
        if subject.group == WRAPPER:
            module = subject.module().train(training)
            assert isinstance(module, RandomBatch)
            return module.module(inputs[0].reshape(-1, *inputs[0].shape[-2:])).dtype
        if subject.group == CONVERTED:
            return subject.call(subject.module(0).train(training), inputs).dtype
        return nn.Linear(C, C)(inputs[0]).dtype


def off(found: Tensor, want: Tensor) -> float:
    return float((found.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def drops(subject: Subject, training: bool) -> bool:
    """Whether weights are dropped that another kernel, or another call, would keep; the op does not know eval."""
    return "dropout" in subject.traits and (training or subject.group == OP)


def check_near(subject: Subject, training: bool, found: Tensor, want: Tensor, tolerance: float = 0.06) -> None:
    assert found.isfinite().all()
    if not drops(subject, training):
        assert off(found, want) < tolerance, f"off by {off(found, want):.1e}"


def _autocast(name: str) -> Callable[[Subject], None]:
    dtype = HALVES[name]

    def column(subject: Subject) -> None:
        for training in (True, False):
            want_dtype = torchs_dtype(subject, dtype, subject.inputs(), training)
            plain = subject.module().train(training)
            torch.manual_seed(5)
            want = subject.call(plain, subject.inputs())
            of_plain: list[Tensor] = []
            for inside in (True, False):
                module, inputs = subject.module().train(training), subject.inputs()
                torch.manual_seed(5)
                with torch.autocast("cpu", dtype):
                    out = subject.call(module, inputs)
                    loss = out.float().square().sum()
                    if inside:
                        loss.backward()
                if not inside:
                    loss.backward()
                assert out.dtype == want_dtype, f"{out.dtype}, and torch's own gives {want_dtype}"
                check_near(subject, training, out, want)
                grads = [x.grad for x in leaves(module, inputs) if x.grad is not None]
                assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)
                of_plain = of_plain or grads
                assert all(off(a, b) < 0.1 for a, b in zip(grads, of_plain, strict=True) if b.norm() > 1)

    column.__doc__ = f"Under autocast to {name}: the dtype that torch's own gives, backward inside and outside."
    return column


def _to(name: str) -> Callable[[Subject], None]:
    dtype = HALVES[name]

    def column(subject: Subject) -> None:
        for training in (True, False):
            want_module = subject.module().train(training)
            torch.manual_seed(5)
            want = subject.call(want_module, subject.inputs())
            module, inputs = subject.module().train(training).to(dtype), subject.inputs(dtype=dtype)
            torch.manual_seed(5)
            out = subject.call(module, inputs)
            assert out.dtype == dtype, out.dtype
            check_near(subject, training, out, want)
            out.float().square().sum().backward()
            grads = [x.grad for x in leaves(module, inputs) if x.grad is not None]
            assert grads
            assert all(g.isfinite().all() and g.dtype == dtype for g in grads)

    column.__doc__ = f"`.to({name})`, inputs too."
    return column


def double(subject: Subject) -> None:
    """`.double()`, inputs too: as float32, but for rounding."""
    for training in (True, False):
        plain, module = subject.module().train(training), subject.module().double().train(training)
        torch.manual_seed(5)
        want = subject.call(plain, subject.inputs())
        torch.manual_seed(5)
        out = subject.call(module, subject.inputs(dtype=torch.float64))
        assert out.dtype == torch.float64
        check_near(subject, training, out, want, 1e-4)


def mixed(subject: Subject) -> None:
    """Under autocast to bf16, an input (of the op: the first) that is bf16 already, with float32 for the rest."""
    module, inputs = subject.module().train(), subject.inputs()
    given = [inputs[0].detach().bfloat16().requires_grad_(), *inputs[1:]]
    want_dtype = torchs_dtype(subject, torch.bfloat16, given, True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(5)
        want = subject.call(module, inputs)
        torch.manual_seed(5)
        out = subject.call(module, given)
    assert out.dtype == want_dtype, f"{out.dtype}, and torch's own gives {want_dtype}"
    check_near(subject, True, out, want)
    out.float().sum().backward()
    assert given[0].grad is not None
    assert given[0].grad.dtype == torch.bfloat16


COLUMNS = {
    "autocast bf16": _autocast("bf16"),
    "autocast fp16": _autocast("fp16"),
    "autocast, mixed dtypes": mixed,
    ".to(bf16)": _to("bf16"),
    ".to(fp16)": _to("fp16"),
    ".double()": double,
}
