"""Columns: derivatives, against central differences in float64 and plain `.backward()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch
from subjects import SMALL, P, Subject, as_judge
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from randbatch.estimators import corrected
from randbatch.estimators.anchors import fit_weights

STEP = 1e-5
_UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


def value(subject: Subject, module: Any, inputs: list[Tensor]) -> Tensor:
    """A number with every derivative; the same random batches every time."""
    torch.manual_seed(5)
    out = subject.call(module, inputs)
    weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    return (weights * out.sin()).sum()


def leaves(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return [*inputs, *(p for p in module.parameters() if p.requires_grad)]


def gradients(subject: Subject, module: nn.Module, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    found = torch.autograd.grad(value(subject, module, inputs), leaves(module, inputs), **_UNUSED, **options)
    return list(found)


def directions(tensors: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in tensors]


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def differences(
    subject: Subject, training: bool, function: Callable[[nn.Module, list[Tensor]], Any], p: int = P
) -> Any:
    """The central difference, along `directions` of inputs and parameters, of what `function` gives in float64."""
    module, inputs = as_judge(subject.module(p)).train(training), subject.inputs(dtype=torch.float64)
    moved = leaves(module, inputs)
    along = [v.double() for v in directions(subject.inputs() + [x.float() for x in moved[len(inputs) :]])]

    def at(step: float) -> Any:
        with torch.no_grad():
            for x, v in zip(moved, along, strict=True):
                x.add_(v, alpha=step)
        found = function(module, inputs)
        with torch.no_grad():
            for x, v in zip(moved, along, strict=True):
                x.sub_(v, alpha=step)
        return found

    with fitted_once(lambda: function(module, inputs)):
        ahead, behind = at(STEP), at(-STEP)
    if isinstance(ahead, Tensor):
        return (ahead - behind) / (2 * STEP)
    return [(a - b) / (2 * STEP) for a, b in zip(ahead, behind, strict=True)]


@cache
def slope(subject: Subject, training: bool) -> Tensor:
    """The central difference of `value`."""
    return differences(subject, training, lambda m, x: value(subject, m, x).detach())


@contextmanager
def fitted_once(call: Callable[[], Any]) -> Iterator[None]:
    """The weights of `corrected` have no gradient, and say so: they stay those of a first call."""
    fitted: list[Any] = []
    with patch.object(corrected, "fit_weights", lambda *a: fitted.append(fit_weights(*a)) or fitted[-1]):
        call()
    again = cycle(fitted)
    with patch.object(corrected, "fit_weights", lambda *a: next(again)):
        yield


def check_close(found: Sequence[Tensor], want: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    """Relative to the largest of them: a gradient may be zero but for rounding."""
    size = max(float(b.detach().double().norm()) for b in want)
    for a, b in zip(found, want, strict=True):
        off = float((a.detach().double() - b.detach().double()).norm())
        assert off <= tolerance * size, f"off by {off / size:.1e} of {size:.1e}"


def gradient(subject: Subject) -> None:
    """By inputs and parameters, along a direction; float64 by the formula is differentiated numerically."""
    for training in (True, False):
        module, inputs = subject.module().train(training), subject.inputs()
        found = gradients(subject, module, inputs)
        if {"dropout", "op"} <= subject.traits or ("dropout" in subject.traits and training):
            want = _own_difference(subject, module, inputs)
            check_close([dot(found, directions(leaves(module, inputs)))], [want], 2e-2)
            continue
        want = slope(subject, training)
        check_close([dot(found, directions(leaves(module, inputs)))], [want], 1e-3)


def _own_difference(subject: Subject, module: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Kernels drop other weights than the formula: in fp32 by the module itself, with a longer step."""
    moved = leaves(module, inputs)
    along, found = directions(moved), []
    for step in (3e-3, -3e-3):
        with torch.no_grad():
            before = [x.clone() for x in moved]
            for x, v in zip(moved, along, strict=True):
                x.add_(v, alpha=step)
            found.append(value(subject, module, inputs).double())
            for x, b in zip(moved, before, strict=True):
                x.copy_(b)
    return (found[0] - found[1]) / 6e-3


def second(subject: Subject) -> None:
    """Hessian times a vector against central differences of the first gradient."""
    for training in (True, False):
        module, inputs = subject.module().train(training), subject.inputs()
        first = gradients(subject, module, inputs, create_graph=True)
        everything = leaves(module, inputs)
        product = dot(first, directions(everything))
        found = torch.autograd.grad(product, everything, **_UNUSED)
        want = differences(subject, training, lambda m, x: gradients(subject, m, x))
        check_close(found, want)


def second_numerically(subject: Subject) -> None:
    """`gradgradcheck` in float64 on small ragged sizes, by the inputs."""
    n, p = SMALL
    module, inputs = subject.module(p).double().eval(), subject.inputs(n, torch.float64)
    for parameter in module.parameters():
        parameter.requires_grad_(False)

    def function(*x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return subject.call(module, list(x))

    with fitted_once(lambda: function(*inputs)):
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def meta_learning(subject: Subject) -> None:
    """The loss after one step of descent, differentiated by the parameters (or inputs) before it."""
    module, inputs = subject.module().eval(), subject.inputs()
    judge, exact = as_judge(subject.module()).eval(), subject.inputs(dtype=torch.float64)
    check_close(_after_a_step(subject, module, inputs), _after_a_step(subject, judge, exact), 1e-3)


def _after_a_step(subject: Subject, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    named = dict(module.named_parameters())
    start = list(named.values()) or inputs
    first = torch.autograd.grad(value(subject, module, inputs), start, create_graph=True, **_UNUSED)
    moved = [x - 0.05 * g for x, g in zip(start, first, strict=True)]
    if not named:
        after = value(subject, module, moved)
    else:
        after = value(subject, _Called(module, dict(zip(named, moved, strict=True))), inputs)
    return list(torch.autograd.grad(after, start, **_UNUSED))


class _Called:
    """A module with other parameters."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self._module, self._parameters = module, parameters

    def __call__(self, *args: Any, **options: Any) -> Any:
        return functional_call(self._module, self._parameters, args, options)


def _pure(subject: Subject, module: nn.Module, inputs: list[Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """`value` as a function of inputs and parameters."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]

    def function(*tensors: Tensor) -> Tensor:
        own, parameters = list(tensors[: len(inputs)]), tensors[len(inputs) :]
        if not names:
            return value(subject, module, own)
        return value(subject, _Called(module, dict(zip(names, parameters, strict=True))), own)

    return function, [x.detach().clone() for x in leaves(module, inputs)]


class _NoGradient(torch.autograd.Function):
    """A function whose backward returns nothing, as one may that is not used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def undefined_gradient(subject: Subject) -> None:
    """No gradient comes in: none, or zeros, go out."""
    for training in (True, False):
        module, inputs = subject.module().train(training), subject.inputs()
        torch.manual_seed(5)
        out: Any = _NoGradient.apply(subject.call(module, inputs))
        found = torch.autograd.grad(out.sum(), leaves(module, inputs), allow_unused=True)
        assert all(g is None or not g.any() for g in found)


def forward_func(subject: Subject) -> None:
    """`torch.func.jvp` against central differences."""
    for training in (True, False):
        function, start = _pure(subject, subject.module().train(training), subject.inputs())
        _, found = jvp(function, tuple(start), tuple(directions(start)))
        want = slope(subject, training)
        check_close([found], [want], 1e-3)


def forward_dual(subject: Subject) -> None:
    """Dual numbers without torch.func, against central differences."""
    for training in (True, False):
        function, start = _pure(subject, subject.module().train(training), subject.inputs())
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, v) for x, v in zip(start, directions(start), strict=True)]
            found = forward_ad.unpack_dual(function(*duals)).tangent
        want = slope(subject, training)
        check_close([found], [want], 1e-3)


def func_grad(subject: Subject) -> None:
    """`torch.func.grad` over `functional_call`, against `.backward()` of the formula in float64."""
    for training in (True, False):
        function, start = _pure(subject, subject.module().train(training), subject.inputs())
        found = grad(function, argnums=tuple(range(len(start))))(*start)
        judge = as_judge(subject.module()).train(training)
        check_close(found, gradients(subject, judge, subject.inputs(dtype=torch.float64)))


def called_with_parameters(subject: Subject) -> None:
    """`functional_call` outside of any transform, and `.backward()`: parameters that are not the module's own."""
    for training in (True, False):
        module, inputs = subject.module().train(training), subject.inputs()
        function, start = _pure(subject, module, inputs)
        start = [x.requires_grad_() for x in start]
        want = gradients(subject, module, inputs)
        for parameter in module.parameters():
            parameter.data.zero_()  # it must not be looked at
        found = torch.autograd.grad(function(*start), start, **_UNUSED)
        check_close(found, want)


SAMPLES = 3


def _samples(subject: Subject) -> tuple[list[Tensor], list[list[Tensor]]]:
    each = [[x.detach() for x in subject.inputs(seed=20 + number)] for number in range(SAMPLES)]
    return [torch.stack(column) for column in zip(*each, strict=True)], each


def over_inputs(subject: Subject) -> None:
    """`vmap` over inputs in eval, against a loop."""
    module = subject.module().eval()
    stacked, each = _samples(subject)
    found = vmap(lambda *x: subject.call(module, list(x)))(*stacked)
    judge = as_judge(subject.module()).eval()
    want = torch.stack([subject.call(judge, [x.double() for x in sample]) for sample in each])
    check_close([found], [want])


def _per_sample(subject: Subject, training: bool, randomness: str) -> None:
    module, inputs = subject.module().train(training), subject.inputs()
    function, start = _pure(subject, module, inputs)
    stacked, each = _samples(subject)
    parameters = start[len(inputs) :]
    argnums = tuple(range(len(inputs), len(start))) or tuple(range(len(inputs)))
    in_dims = (*(0 for _ in inputs), *(None for _ in parameters))
    found = vmap(grad(function, argnums=argnums), in_dims=in_dims, randomness=randomness)(*stacked, *parameters)
    judge = as_judge(subject.module()).train(training)
    for number, sample in enumerate(each):
        own = [x.double().requires_grad_() for x in sample]
        wanted = [p for p in judge.parameters() if p.requires_grad] or own
        want = torch.autograd.grad(value(subject, judge, own), wanted, **_UNUSED)
        check_close([g[number] for g in found], want)


def per_sample(subject: Subject) -> None:
    """`vmap(grad(…))` in eval: the gradient of each sample, against a loop."""
    _per_sample(subject, False, "error")


def per_sample_same(subject: Subject) -> None:
    """In training, `randomness="same"`: one partition for all samples, against a loop from one seed."""
    _per_sample(subject, True, "same")


def per_sample_different(subject: Subject) -> None:
    """In training, `randomness="different"`."""
    _per_sample(subject, True, "different")


def per_sample_error(subject: Subject) -> None:
    """In training, `randomness="error"`, the default."""
    _per_sample(subject, True, "error")


COLUMNS = {
    "gradient": gradient,
    "no gradient": undefined_gradient,
    "hvp": second,
    "gradgradcheck": second_numerically,
    "MAML step": meta_learning,
    "func.jvp": forward_func,
    "dual numbers": forward_dual,
    "functional_call": called_with_parameters,
    "func.grad": func_grad,
    "vmap, eval": over_inputs,
    "vmap(grad), eval": per_sample,
    "vmap(grad), train, same": per_sample_same,
    "vmap(grad), train, different": per_sample_different,
    "vmap(grad), train, error": per_sample_error,
}
