"""Every strategy gives the numbers that all tokens at once give, says why it cannot, and is named when it ran."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import contract
import pytest
import torch
from contract import EXACT, GRAPHS, WIDTH, N
from torch import Tensor, nn

import randbatch as rb
from randbatch.estimators import ESTIMATORS
from randbatch.execution import STRATEGIES, Call, Strategy, run
from randbatch.interactions import INTERACTIONS, Options
from randbatch.interactions.rounds import Projections
from randbatch.nn import RandomBatch, RandomBatchAttention
from randbatch.tolerance import RoundsChoice

pytestmark = pytest.mark.usefixtures("toys")
WHOLE, NAMES = STRATEGIES[-1], [strategy.name for strategy in STRATEGIES]
PADDING = torch.arange(9) >= torch.tensor([9, 4, 1]).unsqueeze(1)
Make = Callable[[], Call]


def heads(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]


def of_op(tensors: list[Tensor] | None = None, interaction: str = "softmax", **options: Any) -> Call:
    """As the op calls: projections that are there."""
    tensors = heads(N) if tensors is None else tensors
    estimator = ESTIMATORS[options.pop("estimator", "plain")]
    projections = Projections(tensors, [(2, 4)] * 3, elements=32)
    how: dict[str, Any] = {"batch_size": 4, "seed": 3} | options
    return Call(projections, INTERACTIONS[interaction], estimator, Options(), **how)


def of_layer(x: Tensor | None = None, **options: Any) -> Call:
    """As a layer calls: projections that are still to be made."""
    sets = {name: options.pop(name) for name in ("batch", "mask", "padded") if name in options}
    layer = contract.layer_of(options.pop("interaction", "softmax"), 4, **options).eval()
    x = torch.randn(N, WIDTH, dtype=torch.float64) if x is None else x
    x.requires_grad_()
    return layer.randbatch_config.call(layer._projections(x, x, x), False, **sets)


def tolerant() -> Call:
    """A few rounds are enough, and one is not."""
    query, key, value = (torch.randn(300, 2, 4, dtype=torch.float64) for _ in range(3))
    return of_op([x.requires_grad_() for x in (query, key, value + 1)], batch_size=16, tolerance=0.15)


CALLS: dict[str, Make] = {
    "op": of_op,
    "op, graphs": lambda: of_op(batch=GRAPHS),
    "op, debiased": lambda: of_op(estimator="debiased", batch=GRAPHS),
    "op, rounds": lambda: of_op(rounds=2, estimator="debiased"),
    "op, chunks": lambda: of_op(chunk_batches=2, batch=GRAPHS),
    "op, rounds in chunks": lambda: of_op(rounds=2, chunk_batches=1, batch=GRAPHS),
    "op, partition": lambda: of_op(partition=rb.random_partition(N, 5)),
    "op, exact": lambda: of_op(exact=True, batch=GRAPHS),
    "op, exact in chunks": lambda: of_op(exact=True, chunk_batches=2),
    "op, tolerance": tolerant,
    "op, tolerance that takes all": lambda: of_op(tolerance=1e-9),
    "op, padded": lambda: of_op(heads(3, 9), padded=True, mask=~PADDING),
    "op, padded in chunks": lambda: of_op(heads(3, 9), padded=True, mask=~PADDING, chunk_batches=1, rounds=2),
    "op, one padded set": lambda: of_op(heads(1, 9), padded=True),
    "op, gaussian": lambda: of_op(interaction="gaussian", rounds=2),
    "op, nothing": lambda: of_op(heads(0)),
    "layer": of_layer,
    "layer, graphs": lambda: of_layer(batch=GRAPHS),
    "layer, reference": lambda: of_layer(backend="reference"),
    "layer, rounds": lambda: of_layer(rounds=2, batch=GRAPHS),
    "layer, rounds in chunks": lambda: of_layer(rounds=2, chunk_batches=1, estimator="debiased"),
    "layer, chunks": lambda: of_layer(chunk_batches=2, batch=GRAPHS),
    "layer, corrected": lambda: of_layer(estimator="corrected"),
    "layer, exact": lambda: of_layer(exact_eval=True),
    "layer, learned": lambda: of_layer(interaction="tempered", chunk_batches=1, batch=GRAPHS),
    "layer, tolerance": lambda: of_layer(tolerance=0.5),
    "layer, padded": lambda: of_layer(torch.randn(3, 9, WIDTH, dtype=torch.float64), padded=True, mask=~PADDING),
}


def of_whole(call: Call, chosen: list[RoundsChoice]) -> Tensor:
    """All at once, from tokens that are flat: `whole` alone, whose formula the other contract tests know."""
    changes: dict[str, Any] = {
        "chunk_batches": None,
        "tolerance": None,
        "observer": None,
        "padded": False,
        "mask": None,
    }
    exact = call.exact
    if call.tolerance is not None:
        changes["rounds"], exact = chosen[-1].rounds, chosen[-1].exact
    changes |= {"batch_size": 10**6, "exact": False, "rounds": 1} if exact else {}
    if not call.padded:
        return WHOLE.run(call.but(**changes))
    keep = torch.ones(call.first.shape[:2], dtype=torch.bool) if call.mask is None else call.mask
    number = torch.arange(len(keep)).unsqueeze(1).expand_as(keep)[keep]
    flat = replace(call.projections, tensors=[x[keep] for x in call.projections.tensors])
    tokens = WHOLE.run(call.but(projections=flat, batch=number, **changes))
    return tokens.new_zeros(*keep.shape, *tokens.shape[1:]).index_put((keep,), tokens)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=NAMES)
@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_a_strategy_gives_the_numbers_of_whole_or_says_why_not(strategy: Strategy, make: Make) -> None:
    """Outputs and gradients, of inputs and of parameters."""
    call, chosen = make(), []
    call.on_choice = chosen.append
    reason = strategy.why_not(call)
    if reason is not None:
        assert reason.strip()
        assert strategy is not WHOLE
        return
    others = [each for each in STRATEGIES[: STRATEGIES.index(strategy)] if each.why_not(call) is None]
    if any(not each.computes for each in others) or (strategy is WHOLE and others):
        return  # it gets the call in another form, or never
    inputs, owner = call.projections.tensors, call.projections.owner
    found = contract.results(strategy.run(call), inputs, owner)
    torch.testing.assert_close(found, contract.results(of_whole(call, chosen), inputs, owner), **EXACT)


def test_a_tolerance_chose_rounds_in_one_case_and_all_in_the_other() -> None:
    chosen: list[RoundsChoice] = []
    for name in ("op, tolerance", "op, tolerance that takes all"):
        run(CALLS[name]().but(on_choice=chosen.append))
    few, everything = chosen
    assert not few.exact
    assert 1 < few.rounds < 10
    assert everything.exact or everything.rounds > 4


def test_every_strategy_takes_some_call() -> None:
    """`opaque` is for `torch.compile` (see `compiling_contract`) and for tensors without numbers."""
    taken = {strategy.name for make in CALLS.values() for strategy in STRATEGIES if strategy.why_not(make()) is None}
    assert taken | {"opaque"} == set(NAMES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", contract.LAYERED)
@pytest.mark.parametrize("options", [{}, {"rounds": 2}, {"chunk_batches": 2}], ids=str)
def test_without_numbers_there_are_shapes(name: str, options: dict) -> None:
    """On meta tensors, with padding and graphs too."""
    if not contract.takes(contract.make(name), **options):
        pytest.skip("it is refused")
    layer = RandomBatchAttention(WIDTH, 2, 4, interaction=name, device="meta", **options)
    layer.to("meta")  # what it made of the name
    x = torch.empty(N, WIDTH, device="meta", requires_grad=True)
    for batch in (None, GRAPHS.to("meta")):
        out = layer(x, batch=batch)
        assert out.is_meta
        assert out.shape == x.shape
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.shape == x.shape
    padded = torch.empty(3, 9, WIDTH, device="meta")
    assert layer(padded, padded, padded, key_padding_mask=PADDING.to("meta"))[0].shape == padded.shape


# What ran is what is said


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the strategies that run meanwhile."""
    ran: list[str] = []
    with monkeypatch.context() as patch:
        for strategy in STRATEGIES:

            def noting(call: Call, name: str = strategy.name, before: Any = strategy.run) -> Tensor:
                ran.append(name)
                return before(call)

            patch.setattr(strategy, "run", noting)
        yield ran


def converted() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True))
    rb.convert(model, 4)
    return model.eval()


def encoder(**options: Any) -> nn.Module:
    return nn.Sequential(RandomBatchAttention(WIDTH, 2, 4, **options), RandomBatch(nn.Linear(WIDTH, WIDTH), 4))


Said = tuple[Callable[[], Any], tuple[int, ...], dict[str, Any], set[str]]
SAID: dict[str, Said] = {
    "op": (lambda: rb.random_batch_attention, (N, 2, 4), {"batch_size": 4}, {"whole"}),
    "op in chunks": (lambda: rb.random_batch_attention, (N, 2, 4), {"batch_size": 4, "chunk_batches": 2}, {"chunked"}),
    "op, tolerance": (lambda: rb.random_batch_attention, (N, 2, 4), {"batch_size": 4, "tolerance": 0.9}, {"observed"}),
    "layer": (lambda: RandomBatchAttention(WIDTH, 2, 4), (N, WIDTH), {}, {"projected"}),
    "layer, rounds": (lambda: RandomBatchAttention(WIDTH, 2, 4, rounds=2), (N, WIDTH), {}, {"whole"}),
    "layer, gaussian": (lambda: RandomBatchAttention(WIDTH, 2, 4, interaction="gaussian"), (N, WIDTH), {}, {"whole"}),
    "layer, exact": (lambda: RandomBatchAttention(WIDTH, 2, 4, exact_eval=True).eval(), (N, WIDTH), {}, {"exact"}),
    "layer and wrapper": (encoder, (N, WIDTH), {}, {"projected", "whole"}),
    "wrapper, padded": (lambda: RandomBatch(nn.Linear(WIDTH, 3), 4), (3, 9, WIDTH), {}, {"flattened", "whole"}),
    "wrapper in chunks": (lambda: RandomBatch(nn.Linear(WIDTH, 3), 4, chunk_batches=2), (N, WIDTH), {}, {"chunked"}),
    "converted": (converted, (3, 9, WIDTH), {}, {"flattened", "projected"}),
}


@pytest.mark.parametrize("name", SAID)
def test_explain_and_the_log_say_what_ran(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make, shape, options, expected = SAID[name]
    function = make()
    inputs = [torch.randn(shape) for _ in range(3 if function is rb.random_batch_attention else 1)]
    state = torch.get_rng_state()
    with watched(monkeypatch) as ran, caplog.at_level(logging.DEBUG, logger="randbatch"):
        found = rb.explain(function, *inputs, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert expected <= set(ran)
    assert [step.strategy for step in found.steps] == ran
    assert [record.message.split(": ")[1].split(" ")[0] for record in caplog.records] == ran
    for step, record in zip(found.steps, caplog.records, strict=True):
        before = NAMES[: NAMES.index(step.strategy)]
        assert [rejected for rejected, _ in step.rejected] == before
        assert record.message.startswith(f"interaction {step.interaction}: {step.strategy} ")
        for rejected, reason in step.rejected:
            assert reason.strip()
            assert f"not {rejected}: {reason}" in record.message
            assert f"not {rejected}: {reason}" in str(step)
        assert f"strategy {step.strategy}" in str(found)


def test_explain_says_where_and_by_which_backend() -> None:
    model = encoder(backend="reference", estimator="debiased")
    first, second = rb.explain(model, torch.randn(N, WIDTH)).steps
    assert (first.where, first.interaction, first.estimator, first.backend) == ("0", "softmax", "debiased", "reference")
    assert (second.where, second.interaction, second.estimator, second.backend) == ("1", "function", "plain", None)
    step = rb.explain(rb.random_batch_attention, *heads(N), batch_size=4).steps[0]
    assert step.backend == "sdpa"
    assert [name for name, _ in step.backends] == ["triton", "cpu"]
    assert all(reason for _, reason in step.backends)


def test_nothing_is_logged_above_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="randbatch"):
        rb.random_batch_attention(*heads(N), batch_size=4)
    assert not caplog.records


def test_the_last_strategy_takes_every_call() -> None:
    assert all(WHOLE.why_not(make()) is None for make in CALLS.values())


def test_a_strategy_that_is_added_is_tried_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One object in the table serves the op, the layer and the wrapper."""

    class Zero(Strategy):
        name = "zero"

        def why_not(self, call: Call) -> str | None:
            return "it is padded" if call.padded else None

        def run(self, call: Call) -> Tensor:
            return torch.zeros_like(call.projections.tensors[-1])

    monkeypatch.setattr("randbatch.execution.table.STRATEGIES", [Zero(), *STRATEGIES])
    x = torch.randn(N, WIDTH)
    assert not rb.random_batch_attention(*heads(N), batch_size=4).any()
    assert not RandomBatchAttention(WIDTH, 2, 4)(x).any()
    assert not RandomBatch(nn.Linear(WIDTH, WIDTH), 4)(x).any()
    (step,) = rb.explain(RandomBatchAttention(WIDTH, 2, 4), torch.randn(N, WIDTH)).steps
    assert step.strategy == "zero"
    padded = torch.randn(2, 5, WIDTH)
    steps = rb.explain(RandomBatch(nn.Linear(WIDTH, 3), 4), padded).steps
    assert steps[0].strategy == "flattened"
    assert steps[0].rejected[0] == ("zero", "it is padded")
