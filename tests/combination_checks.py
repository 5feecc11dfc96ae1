"""What a combination is held to: where a rule refuses it, a sentence that names an option; elsewhere, the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import oracle
import torch
import torch._dynamo  # for the errors of a compiler, and to forget what it compiled
from combination_cases import DTYPES, TRANSFORMS, Case
from combination_entries import Entry, Made
from combination_rules import RULES, Rule, is_fitted
from oracle import Results, Rounded
from torch import Tensor

NEAR, NEAR_BEHIND_A_PROJECTION = 1.05, 1.5  # of debiased's distance to full attention; a projection may stretch it


def check(case: Case) -> bool:
    """Run a case, and return whether it was refused.

    Raises:
        AssertionError: it is refused where no rule says so, or is not where one does, or a number is wrong.
        Exception: of any kind but those that say what is not taken.
    """
    entry = Entry(case)
    rules = [rule for rule in RULES if rule.holds(case, entry)]
    try:
        made = entry.subject(case.stored)
        found = measure(made, case)
    except (ValueError, TypeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as error:
        _check_sentence(error, case, rules)
        return True
    if entry.num_tokens > 0:  # where nothing is computed nothing need be refused
        assert not rules, f"not refused, though {rules[0].reason}"
    if case.drops:
        check_dropout(case, entry, made, found)
    elif case.tolerance is not None and case.entry != "op":
        check_tolerance(case, entry, made, found)
    elif is_fitted(case, entry) and case.rounds_of_call < 999:
        check_corrected(case, entry, made, found)
    else:
        met = entry.met
        oracle.check_errors(found, *of_formula(case, entry, made, met))
        if case.tolerance is not None:
            check_tolerance(case, entry, made, found)
    return False


def _check_sentence(error: Exception, case: Case, rules: Sequence[Rule]) -> None:
    if isinstance(error, torch._dynamo.exc.TorchDynamoException) and case.mode != "compile":
        raise error
    assert rules, f"refused, which no rule says: {type(error).__name__}: {error}"
    assert case.mode != "compile" or "torch.compile cannot" in str(error), f"refused in torch's own words: {error}"
    arguments = [rule.argument for rule in rules]
    assert any(argument in str(error) for argument in arguments), f"none of {arguments} in the message: {error}"


def measure(made: Made, case: Case, *, is_formula: bool = False) -> Results:
    """The output and what else the mode asks for, by name; a derivative's name begins with its kind."""
    leaves = made.leaves
    torch.manual_seed(case.number)
    call = made.call
    if case.mode == "compile" and not is_formula:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    with _autocast(case, made):
        if case.mode == "no_grad":
            with torch.no_grad():
                return {"output": call(*made.inputs)}
        if case.mode in TRANSFORMS:
            return _transform(call, made.inputs, case)
        for leaf in leaves.values():
            leaf.requires_grad_()
        out = call(*made.inputs)
        first = _pull_back([out], leaves, "gradient", create_graph=case.mode == "second")
        found = {"output": out} | first
        if case.mode == "second":
            found |= _pull_back(list(first.values()), leaves, "second derivative")
        if case.mode == "backward":  # which another path may serve
            torch.manual_seed(case.number)
            with torch.no_grad():
                found["output without recording"] = out if is_formula else call(*made.inputs)
    return {name: x.detach() for name, x in found.items()}


def _autocast(case: Case, made: Made) -> AbstractContextManager[Any]:
    if case.autocast is None or (made.inputs[0].dtype == torch.float64 and case.dtype != "fp64"):  # the judge has none
        return nullcontext()
    return torch.autocast("cpu", DTYPES[case.autocast])


def _direction(x: Tensor, number: int = 0) -> Tensor:
    """The same for every dtype; by it an output is made one number, or an input is moved."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def _pull_back(outs: Sequence[Tensor], leaves: Results, kind: str, create_graph: bool = False) -> Results:
    total = sum((out * _direction(out, number)).sum() for number, out in enumerate(outs))
    assert isinstance(total, Tensor)
    if not total.requires_grad:  # first derivatives that are constant
        return {f"{kind} by {name}": torch.zeros_like(x) for name, x in leaves.items()}
    grads = torch.autograd.grad(
        total, list(leaves.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return {f"{kind} by {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _transform(call: Callable[..., Tensor], inputs: Sequence[Tensor], case: Case) -> Results:
    if case.mode == "func.grad":

        def total(*x: Tensor) -> Tensor:
            out = call(*x)
            return (out * _direction(out)).sum()

        grads = torch.func.grad(total, argnums=tuple(range(len(inputs))))(*inputs)
        return {f"gradient by input {number}": grad.detach() for number, grad in enumerate(grads)}
    if case.mode == "func.jvp":
        tangents = tuple(_direction(x, 1 + number) for number, x in enumerate(inputs))
        out, tangent = torch.func.jvp(call, tuple(inputs), tangents)
        return {"output": out.detach(), "tangent": tangent.detach()}
    two = [torch.stack([x, 0.5 - x]) for x in inputs]
    return {"output": torch.func.vmap(call, randomness="same")(*two).detach()}


def of_formula(case: Case, entry: Entry, made: Made, met: Any) -> tuple[Results, Rounded]:
    """What the formula gives in float64, and how it is rounded in the dtype of the case."""
    exact = measure(entry.formula(torch.float64, made, met), case, is_formula=True)
    if case.dtype != "fp64":
        return exact, Rounded(measure(entry.formula(case.stored, made, met), case, is_formula=True), exact)
    # nothing judges float64 but itself: it is rounded as float32 is
    case = replace(case, dtype="fp32", autocast=None)
    plain = entry.formula(torch.float32, made, met)
    of_plain = entry.formula(torch.float64, plain, met)
    return exact, Rounded(*(measure(each, case, is_formula=True) for each in (plain, of_plain)))


def check_tolerance(case: Case, entry: Entry, made: Made, found: Results) -> None:
    """A module says how far its attention is from full attention, which its output is here."""
    full, plain = of_formula(case, entry, made, entry.same)
    assert case.tolerance is not None
    if "output" in found:
        off = oracle.relative_error(found["output"], full["output"])
        assert off <= case.tolerance + plain.relative_error("output"), f"off by {off}, tolerance {case.tolerance}"


def check_corrected(case: Case, entry: Entry, made: Made, found: Results) -> None:
    """Weights that are fitted have no formula: the judge is the same call in float64 by the backend `reference`.

    It is itself no farther from full attention than debiased is, whose formula also says how much is rounded. What is
    fitted to numbers of half precision are other weights: there the output must be as near, and no more is known.
    """
    backend = "auto" if case.entry == "model" else "reference"
    rounds = case.rounds if entry.choice is None else entry.choice.rounds
    judge = entry.subject(torch.float64, backend=backend, rounds=rounds, tolerance=None)
    with torch.no_grad():
        pairs = zip(judge.leaves.values(), made.leaves.values(), strict=True)
        for ours, theirs in pairs:
            ours.copy_(theirs)
    exact = measure(judge, case)
    debiased = replace(case, estimator="debiased", rounds=rounds, tolerance=None)
    like = Entry(debiased)
    of_debiased, rounded = of_formula(debiased, like, made, like.met)
    out = found["output"]
    if case.entry == "op":
        oracle.check_range(out, made.inputs[2], entry.same)
        if rounds == 1:
            inputs = [x.detach() for x in judge.inputs]
            oracle.check_combined(exact["output"], *inputs, like.met, entry.same, case.scale)
    if case.entry != "model":  # of which attention is a part
        full = of_formula(debiased, like, made, entry.same)[0]["output"]
        near = NEAR if case.entry == "op" else NEAR_BEHIND_A_PROJECTION
        worst = near * oracle.relative_error(of_debiased["output"], full)
        for each, rounding in ((exact["output"], 1e-14), (out, rounded.relative_error("output"))):
            off = oracle.relative_error(each, full)
            assert off <= worst + 2 * rounding, f"off full attention by {off:.2e}, debiased by {worst:.2e}"
    if case.computed.itemsize == 2:
        for name, x in found.items():
            assert x.dtype == rounded.plain[name].dtype
            assert bool(x.isfinite().all()), f"{name} is not finite"
    else:
        oracle.check_errors(found, exact, rounded)


def check_dropout(case: Case, entry: Entry, made: Made, found: Results) -> None:
    """Which weights were dropped is not known; a seed repeats it, it matters, and in the mean nothing is lost."""
    again = measure(entry.subject(case.stored), case)
    for name, x in found.items():
        assert bool(x.isfinite().all()), f"{name} is not finite"
        assert torch.equal(x, again[name]), f"{name} is another with the same seed"
    assert case.entry != "op" or "output" not in found or found["output"].dtype == case.computed
    if entry.num_tokens == 0:
        return
    kept_all = measure(entry.subject(case.stored, dropout=0.0), case)
    assert not all(torch.equal(x, kept_all[name]) for name, x in found.items()), "it is the same without dropout"
    if case.estimator == "corrected" or case.entry == "model":
        return
    if case.mode in ("backward", "second"):
        _check_same_mask(case, entry, made, found)
    for sums in ("weighted", "even"):
        made = entry.subject(case.stored, sums=sums)
        out = measure(made, replace(case, mode="no_grad"))["output"]
        out = out if entry.keep is None else out[entry.keep]
        out = out[..., 0] if case.entry == "op" else out[:, :: case.d]
        weights = entry.pair_weights(made)
        oracle.check_kept(out, weights, case.dropout)
        if sums == "even":
            oracle.check_steps(out, weights, case.dropout)


def _check_same_mask(case: Case, entry: Entry, made: Made, found: Results) -> None:
    """Backward drops what forward dropped: attention is linear in its values, so that `g·y = v·∂(g·y)/∂v`."""
    leaves = made.leaves
    if case.entry == "op":
        values = [(leaves["input 2"], found["gradient by input 2"])]
    else:
        names = [name for name in leaves if "in_proj" in name]
        values = [(leaves[name].chunk(3)[2], found[f"gradient by {name}"].chunk(3)[2]) for name in names]
    out = found["output"].double()
    ours = sum(float((x.detach().double() * grad.double()).sum()) for x, grad in values)
    theirs = float((_direction(found["output"]).double() * (out - entry.offset(made))).sum())
    size = sum(float(x.detach().double().norm() * grad.double().norm()) for x, grad in values)
    unit = max(torch.finfo(x.dtype).eps for x in found.values())
    assert abs(ours - theirs) <= 16 * unit * size, f"backward dropped others: {ours:.6f}, forward {theirs:.6f}"
