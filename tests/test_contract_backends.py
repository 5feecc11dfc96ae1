"""Every backend of the table, and the toy, against the formula written out in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import contract
import pytest
import torch
from contract import EXACT, HEADS
from torch import Tensor

import randbatch as rb
from randbatch._errors import InvalidType, InvalidValue
from randbatch.kernels import BACKENDS, Backend, Problem, pick_backend, why_not
from randbatch.partition import Partition

pytestmark = pytest.mark.usefixtures("toys")
every = pytest.mark.parametrize("backend", contract.BACKEND_NAMES)
RAGGED = torch.tensor([7, 0, 2, 0, 0, 2, 5, 0, 2, 2, 0])  # graphs of 5, 4, 1 and 1 tokens, in batches of 4
WIDE = torch.zeros(37, dtype=torch.int64)  # torch's own kernel begins at 16 keys
shapes = pytest.mark.parametrize(("batch", "p"), [(RAGGED, 4), (WIDE, 20)], ids=["ragged", "wide"])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def qkv(batch: Tensor = RAGGED, dtype: torch.dtype = torch.float64, value_size: int = 4) -> list[Tensor]:
    drawn = [torch.randn(len(batch), HEADS, size, dtype=torch.float64) for size in (4, 4, value_size)]
    return [x.to(dtype).requires_grad_() for x in drawn]


def drawn(batch: Tensor, p: int) -> Partition:
    return rb.random_partition(len(batch), p, batch=batch, seed=3)


def formula(inputs: list[Tensor], part: Partition, problem: Problem, shift: Tensor | None = None) -> list[Tensor]:
    """Output and log-sum-exp from the matrix of all logits `[H, N, N]`; `shift` `[N, H]` is added to the own logit."""
    query, key, value = inputs
    allowed = contract.met_matrix([part], len(query))
    own = torch.eye(len(query), dtype=torch.bool)
    logits = torch.einsum("ihd,jhd->hij", query, key) * problem.scale
    logits = logits if shift is None else logits + torch.diag_embed(shift.T)
    logits = logits.masked_fill(~(allowed if problem.exclude_self else allowed | own), -torch.inf)
    lonely = problem.exclude_self & ~allowed.any(1)
    weights = logits.masked_fill(lonely.unsqueeze(1), 0.0).softmax(-1).masked_fill(lonely.unsqueeze(1), 0.0)
    return [torch.einsum("hij,jhe->ihe", weights, value), logits.logsumexp(-1).T]


def able(backend: str, problem: Problem) -> Backend:
    """The backend, where it can."""
    reason = BACKENDS[backend].why_not(problem)
    if reason is not None:
        assert reason.strip()
        pytest.skip(reason)
    return BACKENDS[backend]


def check_error(found: Tensor | None, want: Tensor, plain: Tensor | None) -> None:
    """At most twice as much as the formula in the same dtype errs; some numbers of that are exact by luck."""
    assert found is not None
    assert plain is not None
    known = want.isfinite()
    assert torch.equal(found.detach().double()[~known], want[~known])  # −∞ where there is no key
    error, noise = ((x.detach().double() - want.detach())[known].norm() for x in (found, plain))
    assert error <= max(2 * noise, 4 * torch.finfo(plain.dtype).eps * want[known].norm())


@every
@shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("value_size", [4, 3])
def test_attend(backend: str, batch: Tensor, p: int, dtype: torch.dtype, exclude_self: bool, value_size: int) -> None:
    """The output, and the log-sum-exp where it is wanted; gradients."""
    inputs, part = qkv(batch, dtype, value_size), drawn(batch, p)
    problem = Problem.of(inputs[0], inputs[2], 0.7, need_lse=exclude_self, exclude_self=exclude_self)
    out, lse = able(backend, problem).attend(*inputs, part, problem)
    assert out.dtype == dtype
    assert (lse is not None) == exclude_self
    exact = [x.detach().double().requires_grad_() for x in inputs]
    judges = [formula(each, part, problem) for each in (exact, inputs)]
    check_error(out, judges[0][0], judges[1][0])
    if exclude_self:
        check_error(lse, judges[0][1], formula([x.float() for x in inputs], part, problem)[1])
    found, want, plain = (
        torch.autograd.grad(y.double().sin().sum(), x)
        for y, x in ((out, inputs), (judges[0][0], exact), (judges[1][0], inputs))
    )
    for each in zip(found, want, plain, strict=True):
        check_error(*each)


@every
@shapes
def test_the_log_sum_exp_has_a_gradient(backend: str, batch: Tensor, p: int) -> None:
    inputs, part = qkv(batch, torch.float32), drawn(batch, p)
    problem = Problem.of(inputs[0], inputs[2], None, need_lse=True, exclude_self=True)
    lse: Any = able(backend, problem).attend(*inputs, part, problem)[1]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = formula(exact, part, problem)[1]
    grads = [
        torch.autograd.grad(y[y.isfinite()].sin().sum(), x[:2], allow_unused=True, materialize_grads=True)
        for y, x in ((lse.double(), inputs), (want, exact))
    ]
    torch.testing.assert_close([x.double() for x in grads[0]], list(grads[1]), rtol=1e-5, atol=1e-6)


@every
@shapes
def test_the_reference_in_float64_is_the_formula(backend: str, batch: Tensor, p: int) -> None:
    """And so is every other that takes it: to rounding."""
    inputs, part = qkv(batch), drawn(batch, p)
    for exclude_self in (False, True):
        problem = Problem.of(inputs[0], inputs[2], None, need_lse=True, exclude_self=exclude_self)
        found = able(backend, problem).attend(*inputs, part, problem)
        torch.testing.assert_close(list(found), formula(inputs, part, problem), **EXACT)


@every
@shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_forward_and_backward_of_a_part(
    backend: str, batch: Tensor, p: int, dtype: torch.dtype, exclude_self: bool
) -> None:
    """`out` and `lse` are of attention to more keys than the batch holds: to all of the set, here."""
    inputs, part = qkv(batch, dtype), drawn(batch, p)
    problem = Problem.of(inputs[0], inputs[2], None, need_lse=True, exclude_self=exclude_self)
    chosen = able(backend, problem)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with torch.no_grad():
        results = chosen.forward(*inputs, part, problem), formula(exact, part, problem), formula(inputs, part, problem)
    for each in zip(*results, strict=True):
        check_error(*each)
    whole = drawn(batch, len(batch))
    out, lse = (x.detach() for x in formula(exact, whole, replace(problem, exclude_self=False)))
    grad = torch.randn_like(out)
    allowed = contract.met_matrix([part], len(batch))
    allowed = allowed if exclude_self else allowed | torch.eye(len(batch), dtype=torch.bool)

    def gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        query, key, value = inputs
        logits = torch.einsum("ihd,jhd->hij", query, key) * problem.scale
        weights = (logits - lse.to(query.dtype).T.unsqueeze(-1)).exp() * allowed
        others = torch.einsum("hij,jhe->ihe", weights, value) - weights.sum(-1).T.unsqueeze(-1) * out.to(query.dtype)
        return torch.autograd.grad((others * grad.to(query.dtype)).sum(), inputs)

    filled = [torch.full_like(x, torch.nan) for x in inputs]
    given = [x.detach().to(dtype) for x in (grad, *inputs, out, lse)]
    with torch.no_grad():
        chosen.backward(*given, part, problem, tuple(filled))
    for each in zip(filled, gradients(exact), gradients(inputs), strict=True):
        check_error(*each)


@every
@shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_shift_of_the_own_logit(backend: str, batch: Tensor, p: int, dtype: torch.dtype) -> None:
    """Of every batch and head; and one for all batches of a size."""
    inputs, part = qkv(batch, dtype), drawn(batch, p)
    problem = Problem.of(inputs[0], inputs[2], None)
    chosen = able(backend, problem)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for alike in (False, True):
        shift = [torch.randn(1 if alike else rows, HEADS, dtype=dtype) for rows, _ in part.groups]
        of_batches = torch.cat([each.expand(rows, -1) for each, (rows, _) in zip(shift, part.groups, strict=True)])
        of_tokens = part.unpack(part.spread(of_batches))
        outs = (
            chosen.attend(*inputs, part, problem, shift)[0],
            formula(exact, part, problem, of_tokens.double())[0],
            formula(inputs, part, problem, of_tokens)[0],
        )
        check_error(*outs)
        pairs = zip(outs, (inputs, exact, inputs), strict=True)
        grads = [torch.autograd.grad(out.double().sin().sum(), leaves) for out, leaves in pairs]
        for each in zip(*grads, strict=True):
            check_error(*each)


@every
@pytest.mark.parametrize("share", [0.3])
def test_dropout(backend: str, share: float) -> None:
    """Values that are indicators give the weights: the share of zeros, what the others grow to, the same once more."""
    rows, width = 16, 16
    query = torch.zeros(rows * width, HEADS, 4)
    value = torch.eye(width).repeat(rows, 1).unsqueeze(1).repeat(1, HEADS, 1).requires_grad_()
    part = Partition(torch.arange(rows * width), ((rows, width),))
    problem = Problem.of(query, value, None, share)
    chosen = able(backend, problem)
    out = chosen.attend(query, query, value, part, problem)[0]
    weights = out.detach().reshape(rows, width, HEADS, width)
    kept = weights > 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / width / (1 - share)))
    number = weights.numel()
    assert abs((~kept).sum() - number * share) < 4 * (number * share * (1 - share)) ** 0.5
    (grad,) = torch.autograd.grad(out, value, out.detach())
    want = torch.einsum("mqhp,mqhe->mphe", weights, weights).flatten(0, 1)
    torch.testing.assert_close(grad, want)
    again = chosen.attend(query, query, value, part, problem)[0]
    assert not torch.equal(again, out)


PROBLEMS = {
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "dropout": {"dropout_p": 0.5},
    "dropout and log-sum-exp": {"dropout_p": 0.5, "need_lse": True, "exclude_self": True},
    "log-sum-exp of other values": {"need_lse": True, "value_size": 7},
    "long heads": {"head_size": 1000, "value_size": 1000},
    "transformed": {"transformed": True},
    "a GPU": {"device": torch.device("cuda")},
}
ANY = Problem(torch.device("cpu"), torch.float32, 4, 4, 0.5)


@every
@pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS)
def test_what_it_cannot_it_says_by_name(backend: str, changes: dict) -> None:
    problem = replace(ANY, **changes)
    reason = BACKENDS[backend].why_not(problem)
    assert list(why_not(backend, problem)) == [(BACKENDS[backend], reason)]
    if reason is None:
        assert pick_backend(backend, problem) is BACKENDS[backend]
        return
    assert reason.strip()
    with pytest.raises(InvalidValue) as error:
        pick_backend(backend, problem)
    assert str(error.value) == f"backend {backend!r} cannot be used here: {reason}"


@pytest.mark.filterwarnings("ignore:backend 'auto' does not take")
@pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS)
def test_auto_takes_the_first_that_can(changes: dict) -> None:
    problem = replace(ANY, **changes)
    tried = list(why_not("auto", problem))
    names = [backend.name for backend, _ in tried]
    assert names == contract.BACKEND_NAMES[: len(names)]
    *refused, (taken, none) = tried
    assert none is None
    assert pick_backend("auto", problem) is taken
    assert taken.why_not(problem) is None
    assert taken.auto_on is None or problem.device.type in taken.auto_on
    for backend, reason in refused:
        assert reason
        assert backend.why_not(problem) or problem.device.type not in (backend.auto_on or ())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "debiased": {"estimator": "debiased"},
    "rounds": {"estimator": "debiased", "rounds": 2},
    "rounds in chunks": {"rounds": 2, "chunk_batches": 1},
}


@every
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_op_by_name_or_object(backend: str, options: dict) -> None:
    """Outputs and gradients, against the formula over those that were met."""
    inputs, merged = qkv(dtype=torch.float32), "rounds" in options
    chosen = able(backend, Problem.of(inputs[0], inputs[2], None, need_lse=merged, exclude_self=merged))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    met = contract.met_in(len(RAGGED), 4, options.get("rounds", 1), RAGGED, seed=3)
    delta = contract.DELTA[options.get("estimator", "plain")]
    estimate = contract.estimate(contract.make("softmax"), exact, met, delta, RAGGED)
    out = contract.op("softmax", inputs, batch=RAGGED, backend=backend, **options)
    found = [x.double() for x in contract.results(out, inputs)]
    torch.testing.assert_close(found, contract.results(estimate, exact), rtol=1e-5, atol=1e-6)
    assert torch.equal(contract.op("softmax", inputs, batch=RAGGED, backend=chosen, **options), out)


@every
def test_a_layer_by_name(backend: str) -> None:
    able(backend, Problem.of(*qkv(dtype=torch.float32)[:2], None))
    layer = contract.layer_of("softmax", 4, backend=backend, dtype=torch.float32).eval()
    exact = contract.layer_of("softmax", 4).eval()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(len(RAGGED), contract.WIDTH)
    met = contract.met_in(len(RAGGED), 4, 1, RAGGED, seed=5)
    softmax = contract.make("softmax")
    want = contract.around(exact, x.double(), lambda heads: contract.estimate(softmax, heads, met, 0.0, RAGGED))
    torch.testing.assert_close(layer(x, batch=RAGGED).double(), want, rtol=1e-5, atol=1e-6)
    assert {step.backend for step in rb.explain(layer, x).steps} == {backend}


@pytest.mark.unchecked
def test_unknown_names_and_other_objects_are_refused() -> None:
    inputs = [x.detach() for x in qkv()]
    with pytest.raises(InvalidValue, match=r"backend must be one of .*'toy'; got 'toys'\. Did you mean 'toy'"):
        contract.op("softmax", inputs, backend="toys")
    with pytest.raises(InvalidType, match=r"backend must be a name, or an object of Backend, got int"):
        contract.op("softmax", inputs, backend=3)


@every
def test_a_name_is_given_once(backend: str) -> None:
    assert BACKENDS[backend].name == backend
    with pytest.raises(InvalidValue, match=f"backend {backend!r} is registered already"):
        rb.kernels.register(BACKENDS[backend])
