"""Columns: weights that are not plain parameters. The judge is the plain module in float64, with what they come to.

A parametrized weight is a function of leaves; its gradients are the judge's, pulled back through that function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from derivatives import check_close, value
from memory import backward
from subjects import Subject, as_judge
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

Leaves = dict[str, Tensor]


def matrices(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, owner and name of every weight matrix."""
    for path, owner in list(module.named_modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dim() == 2:
                yield f"{path}.{name}".lstrip("."), owner, name


def judge_of(subject: Subject, training: bool) -> tuple[nn.Module, list[Tensor]]:
    """Float64 by the formula; kernels drop other weights than the formula, so with dropout the plain row itself."""
    if "dropout" in subject.traits and training:
        return subject.module().train(), subject.inputs()
    return as_judge(subject.module()).train(training), subject.inputs(dtype=torch.float64)


def check(
    subject: Subject,
    change: Callable[[nn.Module], Leaves],
    weight_of: Callable[[str, Leaves], Tensor],
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    backward_inside: bool = False,
) -> None:
    """`change` gives a module other leaves, by name; `weight_of` a path and these leaves is the matrix there."""
    for training in (True, False):
        module, inputs = subject.module().train(training), subject.inputs()
        paths = [path for path, *_ in matrices(module)]
        leaves = change(module)
        with ExitStack() as stack:
            stack.enter_context(around())
            loss = value(subject, module, inputs)
            if not backward_inside:
                stack.close()
            found = torch.autograd.grad(loss, [*inputs, *leaves.values()], allow_unused=True, materialize_grads=True)
        judge, exact = judge_of(subject, training)
        own = {name: leaf.detach().to(exact[0].dtype).requires_grad_() for name, leaf in leaves.items()}
        weights = [weight_of(path, own) for path in paths]
        parameters = [getattr(owner, name) for _, owner, name in matrices(judge)]
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data.copy_(weight.detach())
        loss = value(subject, judge, exact)
        first = torch.autograd.grad(loss, [*exact, *parameters], allow_unused=True, materialize_grads=True)
        pulled = torch.autograd.grad(weights, list(own.values()), first[len(exact) :], allow_unused=True)
        check_close(found, [*first[: len(exact)], *(g for g in pulled if g is not None)])


def hypernetwork(subject: Subject) -> None:
    """`del m.weight; m.weight = w * 1.0`, for every weight and bias."""

    def change(module: nn.Module) -> Leaves:
        leaves: Leaves = {}
        for path, owner, name in matrices(module):
            leaf = getattr(owner, name).detach().clone().requires_grad_()
            delattr(owner, name)
            setattr(owner, name, leaf * 1.0)
            leaves[path] = leaf
        return leaves

    check(subject, change, lambda path, leaves: leaves[path] * 1.0)


class _Bent(nn.Module):
    """A parametrization that is not linear."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * x.sin()


def _parametrized(module: nn.Module) -> Leaves:
    leaves: Leaves = {}
    for path, owner, name in matrices(module):
        parametrize.register_parametrization(owner, name, _Bent())
        parametrizations_of = owner.parametrizations
        assert isinstance(parametrizations_of, nn.ModuleDict)
        leaves[path] = parametrizations_of[name].original  # type: ignore[assignment]
    return leaves


def parametrized(subject: Subject) -> None:
    """`torch.nn.utils.parametrize`."""
    check(subject, _parametrized, lambda path, leaves: _Bent()(leaves[path]))


def parametrized_once(subject: Subject) -> None:
    """The same inside `parametrize.cached()`, where a weight is computed once."""
    check(subject, _parametrized, lambda path, leaves: _Bent()(leaves[path]), parametrize.cached)


def parametrized_once_for_both(subject: Subject) -> None:
    """Backward too is inside `parametrize.cached()`."""
    check(subject, _parametrized, lambda path, leaves: _Bent()(leaves[path]), parametrize.cached, True)


def _normed(path: str, leaves: Leaves) -> Tensor:
    g, v = leaves[path + " g"], leaves[path + " v"]
    return g * v / v.norm(dim=1, keepdim=True)


def norm_of_weights(subject: Subject) -> None:
    """`torch.nn.utils.parametrizations.weight_norm`."""

    def change(module: nn.Module) -> Leaves:
        leaves: Leaves = {}
        for path, owner, name in matrices(module):
            parametrizations.weight_norm(owner, name)
            inner = owner.parametrizations[name]  # type: ignore[index]
            leaves |= {path + " g": inner.original0, path + " v": inner.original1}
        return leaves

    check(subject, change, _normed)


def old_norm_of_weights(subject: Subject) -> None:
    """`torch.nn.utils.weight_norm`, which is deprecated: a hook puts a tensor in the weight's place."""

    def change(module: nn.Module) -> Leaves:
        leaves: Leaves = {}
        for path, owner, name in matrices(module):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                weight_norm(owner, name)
            leaves |= {f"{path} {letter}": getattr(owner, f"{name}_{letter}") for letter in "gv"}
        return leaves

    check(subject, change, _normed)


def spectral(subject: Subject) -> None:
    """`torch.nn.utils.parametrizations.spectral_norm` in eval, where its vectors stay."""
    module, inputs = subject.module().eval(), subject.inputs()
    norms = {}
    for path, owner, name in matrices(module):
        parametrizations.spectral_norm(owner, name)
        norms[path] = owner.parametrizations[name]  # type: ignore[index]
    originals = [norm.original for norm in norms.values()]
    found = torch.autograd.grad(
        value(subject, module.eval(), inputs), [*inputs, *originals], allow_unused=True, materialize_grads=True
    )
    judge, exact = judge_of(subject, False)
    own = [original.detach().double().requires_grad_() for original in originals]
    weights = []
    for norm, w in zip(norms.values(), own, strict=True):
        u, v = norm[0]._u.double(), norm[0]._v.double()
        weights.append(w / torch.dot(u, w @ v))
    parameters = [getattr(owner, name) for _, owner, name in matrices(judge)]
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight.detach())
    loss = value(subject, judge, exact)
    first = torch.autograd.grad(loss, [*exact, *parameters], allow_unused=True, materialize_grads=True)
    check_close(found, [*first[: len(exact)], *torch.autograd.grad(weights, own, first[len(exact) :])])


def pruned(subject: Subject) -> None:
    """`torch.nn.utils.prune`: a mask times the original, put in place by a hook."""
    masks: dict[str, Tensor] = {}

    def change(module: nn.Module) -> Leaves:
        leaves: Leaves = {}
        for path, owner, name in matrices(module):
            prune.l1_unstructured(owner, name, 0.4)
            masks[path] = getattr(owner, f"{name}_mask")
            leaves[path] = getattr(owner, f"{name}_orig")
        return leaves

    check(subject, change, lambda path, leaves: leaves[path] * masks[path])


class _Twice(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


def _twice(subject: Subject, pair: nn.Module, inputs: list[Tensor]) -> Tensor:
    assert isinstance(pair, _Twice)
    more = [x * 0.7 for x in inputs]
    return value(subject, pair.first, inputs) + value(subject, pair.second, more)


def tied(subject: Subject) -> None:
    """Two modules with one set of weights: their gradients are added."""
    for training in (True, False):
        first, second = subject.module(), subject.module()
        for (_, owner, name), (_, other, _) in zip(matrices(first), matrices(second), strict=True):
            setattr(other, name, getattr(owner, name))
        pair, inputs = _Twice(first, second).train(training), subject.inputs()
        shared = [getattr(owner, name) for _, owner, name in matrices(first)]
        found = torch.autograd.grad(
            _twice(subject, pair, inputs), [*inputs, *shared], allow_unused=True, materialize_grads=True
        )
        one, exact = judge_of(subject, training)
        two, _ = judge_of(subject, training)
        apart = [[getattr(owner, name) for _, owner, name in matrices(m)] for m in (one, two)]
        loss = _twice(subject, _Twice(one, two), exact)
        want = torch.autograd.grad(loss, [*exact, *apart[0], *apart[1]], allow_unused=True, materialize_grads=True)
        num, size = len(exact), len(shared)
        added = [a + b for a, b in zip(want[num : num + size], want[num + size :], strict=True)]
        check_close(found, [*want[:num], *added])


def frozen(subject: Subject) -> None:
    """Weights that need no gradient: the others get theirs, and these get none."""
    for training in (True, False):
        module, inputs = subject.module().train(training), subject.inputs()
        for path, owner, name in matrices(module):
            if len(path) % 2:
                getattr(owner, name).requires_grad_(False)
        rest = [p for p in module.parameters() if p.requires_grad]
        where = [i for i, p in enumerate(module.parameters()) if p.requires_grad]
        loss = value(subject, module, inputs)
        found = torch.autograd.grad(loss, [*inputs, *rest], allow_unused=True, materialize_grads=True)
        judge, exact = judge_of(subject, training)
        wanted = list(judge.parameters())
        loss = value(subject, judge, exact)
        want = torch.autograd.grad(
            loss, [*exact, *(wanted[i] for i in where)], allow_unused=True, materialize_grads=True
        )
        check_close(found, want)


def eval_between(subject: Subject) -> None:
    """`.eval()` between forward and backward, and `.train()`: backward is of the forward that was."""
    for training in (True, False):
        want = backward(subject.call, subject.module().train(training), subject.inputs())
        module = subject.module().train(training)
        found = backward(subject.call, module, subject.inputs(), lambda m=module, t=training: m.train(not t))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        assert all(each.training is not training for each in module.modules())


COLUMNS = {
    "hypernetwork": hypernetwork,
    "parametrize": parametrized,
    "parametrize.cached": parametrized_once,
    "cached, backward inside": parametrized_once_for_both,
    "weight_norm": norm_of_weights,
    "old weight_norm": old_norm_of_weights,
    "spectral_norm": spectral,
    "prune": pruned,
    "tied weights": tied,
    "frozen weights": frozen,
    "eval() before backward": eval_between,
}
