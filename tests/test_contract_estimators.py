"""Every estimator of the table, and the toy: with every interaction it is right, or refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from contract import DELTA, EXACT, GRAPHS, WIDTH, N, definition, inputs_of, make, op, results
from torch import Tensor

import randbatch as rb
from randbatch._errors import InvalidType, InvalidValue
from randbatch.estimators import ESTIMATORS, Estimator
from randbatch.estimators.probe import Probe

pytestmark = pytest.mark.usefixtures("toys")
every = pytest.mark.parametrize("estimator", contract.ESTIMATOR_NAMES)
served = pytest.mark.parametrize(("estimator", "name"), contract.SERVED)
refused = pytest.mark.parametrize(("estimator", "name"), contract.REFUSED)
graphs_or_one = pytest.mark.parametrize("batch", [None, GRAPHS], ids=["one set", "graphs"])


def close(found: Any, want: Any, **bounds: float) -> None:
    torch.testing.assert_close(found, want, **(EXACT | bounds))


def limits(name: str) -> list[dict[str, int]]:
    """Options with which it is no estimate any more."""
    found = [{"batch_size": N}, {"batch_size": N + 7}]
    found += [{"batch_size": N, "rounds": 2}] if contract.takes(make(name), 2) else []
    return [*found, {"batch_size": 4, "rounds": 99}] if name in contract.MERGING else found


@served
@graphs_or_one
def test_one_batch_or_all_rounds_are_exact(estimator: str, name: str, batch: Tensor | None) -> None:
    """Outputs and gradients."""
    interaction = make(name)
    inputs = inputs_of(interaction)
    want = results(definition(interaction, inputs, batch), inputs, interaction)
    for options in limits(name):
        out = op(interaction, inputs, estimator=estimator, batch=batch, **options)
        close(results(out, inputs, interaction), want, rtol=1e-10)


@refused
def test_what_it_cannot_serve_is_refused_by_name(estimator: str, name: str) -> None:
    """In the op, in the config, when the config is changed."""
    interaction = make(name)
    words = f"estimator '{estimator}' cannot serve interaction '{name}': [a-z]"
    assert ESTIMATORS[estimator].why_not(interaction)
    with pytest.raises(InvalidValue, match=words):
        op(interaction, inputs_of(interaction), estimator=estimator)
    with pytest.raises(InvalidValue, match=words):
        rb.nn.RandomBatchConfig(4, interaction=interaction, estimator=estimator)
    if name in contract.LAYERED:
        with pytest.raises(InvalidValue, match=words):
            rb.nn.RandomBatchAttention(WIDTH, 2, 4, interaction=interaction, estimator=estimator)
        layer = rb.nn.RandomBatchAttention(WIDTH, 2, 4, interaction=interaction)
        layer.randbatch_config.estimator = estimator
        with pytest.raises(InvalidValue, match=words):
            layer(torch.randn(N, WIDTH))


@pytest.mark.parametrize(("estimator", "name"), contract.PAIRS)
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("chunk", [None, 2])
def test_right_or_refused(estimator: str, name: str, rounds: int, chunk: int | None) -> None:
    """Of those with a δ the formula is known; of others that chunks and the order of tokens change nothing."""
    interaction, found = make(name), ESTIMATORS[estimator]
    inputs = [x.detach() for x in inputs_of(interaction)]
    options = {"estimator": estimator, "rounds": rounds, "batch": GRAPHS}
    try:
        out = op(interaction, inputs, chunk_batches=chunk, **options)
    except (InvalidValue, NotImplementedError) as error:
        no_rule = not contract.takes(interaction, rounds, chunk)
        declared = found.why_not(interaction), chunk and not found.can_chunk, no_rule
        assert any(declared), error
        assert f"'{estimator}'" in str(error) or f"'{name}'" in str(error)
        return
    assert found.why_not(interaction) is None
    assert chunk is None or found.can_chunk
    if estimator in DELTA and name in contract.MERGING:
        met = contract.met_in(N, 4, rounds, GRAPHS, seed=3)
        close(out, contract.estimate(interaction, inputs, met, DELTA[estimator], GRAPHS))
        return
    close(out, op(interaction, inputs, **options))
    assert out.isfinite().all()


@served
def test_what_is_called_the_identity_is_the_in_batch_output(estimator: str, name: str) -> None:
    """And no other estimator is that."""
    interaction = make(name)
    inputs = [x.detach() for x in inputs_of(interaction)]
    part = rb.random_partition(N, 4, seed=3)
    in_batch = contract.in_batches(interaction, inputs, part)
    same = torch.allclose(op(interaction, inputs, partition=part, estimator=estimator), in_batch, **EXACT)
    assert same == ESTIMATORS[estimator].is_identity


@every
def test_chunks_are_taken_or_refused_by_name(estimator: str) -> None:
    x = torch.randn(N, WIDTH)
    if ESTIMATORS[estimator].can_chunk:
        layer = rb.nn.RandomBatchAttention(WIDTH, 2, 4, estimator=estimator, chunk_batches=2)
        assert layer(x).isfinite().all()
        return
    words = f"chunk_batches must be None with estimator '{estimator}'"
    with pytest.raises(InvalidValue, match=words):
        rb.nn.RandomBatchAttention(WIDTH, 2, 4, estimator=estimator, chunk_batches=2)
    layer = rb.nn.RandomBatchAttention(WIDTH, 2, 4, estimator=estimator)
    layer.randbatch_config.chunk_batches = 2
    with pytest.raises(InvalidValue, match=words):
        layer(x)


# At a few tokens


@every
@graphs_or_one
@pytest.mark.parametrize("rounds", [1, 2, 99])
def test_at_tokens_it_is_the_op(estimator: str, batch: Tensor | None, rounds: int) -> None:
    """Of sets of at most 64 tokens all are anchors, in the op and in the probe."""
    inputs = [x.detach() for x in inputs_of(make("softmax"))]
    tokens = torch.stack([torch.randperm(N)[:7] for _ in range(contract.HEADS)])
    probe = Probe(*inputs, tokens, 4**-0.5, [ESTIMATORS[estimator]])
    for part in contract.draw_rounds(N, 4, rounds, batch=batch, seed=3):
        probe.add(part)
    out = op("softmax", inputs, estimator=estimator, batch=batch, rounds=rounds)
    want = torch.stack([out[rows, head] for head, rows in enumerate(tokens)])
    bound = 1e-12 if estimator in DELTA else 1e-7  # weights that are fitted come from normal equations
    close(probe.outputs()[estimator], want, rtol=bound, atol=bound)


@every
def test_it_chooses_rounds_and_is_measured(estimator: str) -> None:
    q, k, v = (torch.randn(300, 2, 8) / 2 for _ in range(3))
    choice = rb.choose_rounds(q, k, v + 1, batch_size=16, tolerance=0.2, estimator=estimator)
    assert choice.exact or choice.rounds >= 1
    found = rb.analysis.attention_error((q, k, v), batch_sizes=(16, 300), estimators=(estimator,), draws=2)
    (layer,) = found.layers
    assert layer.error[estimator][300] < 1e-5
    exact = rb.full_attention(q, k, v)
    draws = [rb.random_batch_attention(q, k, v, batch_size=16, estimator=estimator, seed=seed) for seed in range(8)]
    error = torch.stack([(out - exact).norm() / exact.norm() for out in draws]).square().mean().sqrt()
    assert layer.error[estimator][16] == pytest.approx(error.item(), rel=0.2)


class _Bare(Estimator):
    """It defines nothing."""

    name = "bare"


class _Once(_Bare):
    name = "once"

    def in_batches(self, interaction: Any, projected: Any, part: Any, options: Any) -> Tensor:
        return interaction.in_batches(part, projected, options)


def test_what_it_does_not_define_is_refused() -> None:
    inputs = inputs_of(make("softmax"))
    with pytest.raises(NotImplementedError, match="estimator 'bare' does not define `in_batches`"):
        op("softmax", inputs, estimator=_Bare())
    assert op("softmax", inputs, estimator=_Once()).isfinite().all()
    for options in ({}, {"chunk_batches": 2}):
        with pytest.raises(InvalidValue, match="rounds must be 1 with estimator 'once'"):
            op("softmax", inputs, estimator=_Once(), rounds=2, **options)
    q, k, v = (x.detach() for x in inputs)
    with pytest.raises(InvalidValue, match="must be one that can be probed at a few tokens, got 'once'"):
        rb.choose_rounds(q, k, v, batch_size=4, tolerance=0.01, estimator=_Once())


# The table


@every
def test_a_name_is_its_object(estimator: str) -> None:
    inputs = [x.detach() for x in inputs_of(make("softmax"))]
    assert ESTIMATORS[estimator].name == estimator
    close(op("softmax", inputs, estimator=estimator), op("softmax", inputs, estimator=ESTIMATORS[estimator]))
    layer = rb.nn.RandomBatchAttention(WIDTH, 2, 4, estimator=estimator)
    assert layer.randbatch_config.estimator is ESTIMATORS[estimator]
    assert estimator == "plain" or f"estimator={estimator!r}" in repr(layer)
    with pytest.raises(InvalidValue, match=f"estimator {estimator!r} is registered already"):
        rb.estimators.register(estimator)(type(ESTIMATORS[estimator]))


@pytest.mark.unchecked
@pytest.mark.parametrize("wrong", [int, 3, "plain"])
def test_only_estimators_are_registered(wrong: Any) -> None:
    with pytest.raises(InvalidType, match="must be a subclass of Estimator, got"):
        rb.estimators.register("wrong")(wrong)
    assert "wrong" not in ESTIMATORS


@pytest.mark.unchecked
def test_unknown_names_and_other_objects_are_refused() -> None:
    inputs = inputs_of(make("softmax"))
    with pytest.raises(
        InvalidValue, match=r"estimator must be one of .*'halfway'; got 'halway'\. Did you mean 'halfway'"
    ):
        op("softmax", inputs, estimator="halway")
    with pytest.raises(InvalidType, match=r"estimator must be a name, or an object of Estimator, got int"):
        op("softmax", inputs, estimator=3)


@every
def test_train_takes_every_estimator(estimator: str, tmp_path: Path) -> None:
    run = contract.TinyRun(tmp_path, "--attention", "rba", "--estimator", estimator, "--rounds", "2")
    assert run.result()["estimator"] == estimator
