"""Every interaction of the table, and the toys: one definition, however it is computed."""

from __future__ import annotations

from typing import Any

import contract
import pytest
import torch
from contract import (
    GRAPHS,
    N,
    close,
    definition,
    every,
    every_merging,
    graphs_or_one,
    inputs_of,
    make,
    op,
    results,
)
from torch import Tensor, nn

import randbatch as rb
from randbatch._errors import InvalidValue
from randbatch.interactions import Kind, Options
from randbatch.interactions.merge import Partial

pytestmark = pytest.mark.usefixtures("toys")


# One batch that holds all


@every
@graphs_or_one
@pytest.mark.parametrize("options", contract.MODES.values(), ids=contract.MODES)
def test_one_batch_is_the_definition(name: str, batch: Tensor | None, options: dict) -> None:
    interaction = make(name)
    if not contract.takes(interaction, **options):
        pytest.skip("it is refused, see test_what_has_no_rule_is_refused")
    inputs = inputs_of(interaction)
    out = op(interaction, inputs, batch_size=N, batch=batch, **options)
    close(results(out, inputs, interaction), results(definition(interaction, inputs, batch), inputs, interaction))


# Partial sums


@every_merging
def test_the_others_and_the_token_itself_are_all(name: str) -> None:
    interaction = make(name)
    inputs = inputs_of(interaction)
    block = contract.whole_block(interaction, inputs)
    others = interaction.partial(block, *(x.unsqueeze(0) for x in inputs))
    own = interaction.own(block, *inputs)
    if interaction.kind is Kind.SUM:
        assert others.log_norm is None
        assert own.log_norm is None
        merged = others.out[0] + own.out
    else:
        more, less = others.log_norm[0].exp().unsqueeze(-1), own.log_norm.exp().unsqueeze(-1)
        merged = (more * others.out[0] + less * own.out) / (more + less)
    close(merged, definition(interaction, inputs))


@pytest.mark.parametrize("apart", [0.0, 3.0, 50.0, 900.0])
def test_two_partial_sums_are_merged_by_their_weights(apart: float) -> None:
    """Also where one weight is e^900 times the other: first and second derivatives are finite and right."""
    out, other = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    log_norm = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    theirs = (torch.randn(3, 2, dtype=torch.float64) - apart).requires_grad_()

    def merge(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        merged = Partial(tensors[0], tensors[1]).merge(Partial(tensors[2], tensors[3]))
        assert merged.log_norm is not None
        return merged.out, merged.log_norm

    inputs = out, log_norm, other, theirs
    share = torch.sigmoid(theirs - log_norm).unsqueeze(-1)
    close(merge(*inputs), (out + share * (other - out), torch.logaddexp(log_norm, theirs)))
    assert torch.autograd.gradcheck(merge, inputs)
    assert torch.autograd.gradgradcheck(merge, inputs)


def test_nothing_is_merged_with_something() -> None:
    """A token that met nobody."""
    something = Partial(torch.randn(2, 1, 4), torch.randn(2, 1))
    nothing = Partial(torch.zeros(2, 1, 4), torch.full((2, 1), -torch.inf))
    close(something.merge(nothing), something)
    close(nothing.merge(something), something)
    both = nothing.merge(nothing)
    close(both.merge(something), something)


# Rounds


@every_merging
@graphs_or_one
@pytest.mark.parametrize("estimator", contract.DELTA)
@pytest.mark.parametrize("rounds", [1, 2, 99])
def test_rounds_are_the_formula_over_those_that_were_met(
    name: str, batch: Tensor | None, estimator: str, rounds: int
) -> None:
    interaction = make(name)
    inputs = inputs_of(interaction)
    met = contract.met_in(N, 4, rounds, batch, seed=3)
    want = contract.estimate(interaction, inputs, met, contract.DELTA[estimator], batch)
    if rounds == 99:  # all have met
        want = definition(interaction, inputs, batch)
    out = op(interaction, inputs, batch=batch, rounds=rounds, estimator=estimator)
    close(results(out, inputs, interaction), results(want, inputs, interaction), rtol=1e-10)


@pytest.mark.parametrize("name", contract.AVERAGING)
@pytest.mark.parametrize("chunk", [None, 2])
def test_rounds_of_what_cannot_be_merged_are_averaged(name: str, chunk: int | None) -> None:
    """Over independent partitions."""
    interaction = make(name)
    inputs = inputs_of(interaction)
    parts = list(contract.draw_rounds(N, 4, 3, seed=3).independent())
    assert len(parts) == 3
    want = torch.stack([contract.in_batches(interaction, inputs, part) for part in parts]).mean(0)
    out = op(interaction, inputs, rounds=3, chunk_batches=chunk)
    close(results(out, inputs, interaction), results(want, inputs, interaction))


@every
@pytest.mark.parametrize("options", contract.MODES.values(), ids=contract.MODES)
def test_what_has_no_rule_is_refused(name: str, options: dict) -> None:
    interaction = make(name)
    if contract.takes(interaction, **options):
        return
    with pytest.raises((InvalidValue, NotImplementedError), match=f"must be (1|None) with interaction {name!r}"):
        op(interaction, inputs_of(interaction), **options)


def all_partitions() -> list[rb.Partition]:
    """Of six tokens, in two batches of three: ten."""
    found = []
    for i in range(1, 6):
        for j in range(i + 1, 6):
            rest = [k for k in range(6) if k not in (0, i, j)]
            found.append(rb.Partition(torch.tensor([0, i, j, *rest]), ((2, 3),)))
    assert len(found) == 10
    return found


@every_merging
def test_debiased_is_unbiased(name: str) -> None:
    """Over all partitions: the numerator and the denominator of a ratio, and a sum itself; κ = 5/2."""
    interaction = make(name)
    inputs = inputs_of(interaction, 6)
    found = [op(interaction, inputs, partition=part, estimator="debiased") for part in all_partitions()]
    if interaction.kind is Kind.SUM:
        close(torch.stack(found).mean(0), definition(interaction, inputs))
        return
    block = contract.whole_block(interaction, inputs)
    every_other = interaction.partial(block, *(x.unsqueeze(0) for x in inputs))
    own = interaction.own(block, *inputs)
    full, alone = every_other.log_norm[0].exp(), own.log_norm.exp()
    estimates = []
    for part, out in zip(all_partitions(), found, strict=True):
        met = interaction.others(part, inputs, Options())
        denominator = 2.5 * met.log_norm.exp()
        estimates.append((denominator.unsqueeze(-1) * met.out, denominator))
        both = estimates[-1][0] + alone.unsqueeze(-1) * own.out
        close(out, both / (denominator + alone).unsqueeze(-1))
    numerator, denominator = (torch.stack(each).mean(0) for each in zip(*estimates, strict=True))
    close(denominator, full)
    close(numerator, full.unsqueeze(-1) * every_other.out[0])


# However it is computed


@every
@graphs_or_one
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("estimator", ["plain", "debiased"])
def test_chunks_change_nothing(name: str, batch: Tensor | None, rounds: int, estimator: str) -> None:
    interaction = make(name)
    options: dict[str, Any] = {"batch": batch, "rounds": rounds, "estimator": estimator}
    if (estimator, name) in contract.REFUSED or not contract.takes(interaction, rounds, 1):
        pytest.skip("it is refused")
    inputs = inputs_of(interaction)
    want = results(op(interaction, inputs, **options), inputs, interaction)
    for chunk in (1, 3, "auto"):
        close(results(op(interaction, inputs, chunk_batches=chunk, **options), inputs, interaction), want)


@every
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_graph_gets_what_it_gets_alone(name: str, rounds: int) -> None:
    interaction = make(name)
    if not contract.takes(interaction, rounds):
        pytest.skip("it is refused")
    inputs = [x.detach() for x in inputs_of(interaction)]
    together = op(interaction, inputs, batch=GRAPHS, rounds=rounds)
    for rows in contract.sets_of(GRAPHS, N):
        alone = [x[rows] for x in inputs]
        close(op(interaction, alone, rounds=rounds), together[rows])
        close(op(interaction, alone, batch=torch.full_like(rows, 31), rounds=rounds), together[rows])


@every
@graphs_or_one
def test_the_order_of_tokens_does_not_matter(name: str, batch: Tensor | None) -> None:
    interaction = make(name)
    inputs = [x.detach() for x in inputs_of(interaction)]
    part = rb.random_partition(N, 4, batch=batch)
    order = torch.randperm(N)
    moved = rb.Partition(order.argsort()[part.order], part.groups, part.set_of_batch, part.set_sizes)
    want = op(interaction, inputs, partition=part)[order]
    close(op(interaction, [x[order] for x in inputs], partition=moved), want)


# Derivatives

SMALL = torch.tensor([0, 1, 0, 0, 2, 0, 2])
DERIVED = {
    "one round": {},
    "debiased": {"estimator": "debiased"},
    "rounds": {"rounds": 2, "estimator": "debiased"},
    "chunks": {"chunk_batches": 1},
    "rounds in chunks": {"rounds": 2, "chunk_batches": 1},
}


@every
@pytest.mark.parametrize("options", DERIVED.values(), ids=DERIVED)
def test_derivatives(name: str, options: dict) -> None:
    """First and second, of graphs of 4, 2 and 1 tokens, by inputs and by parameters; chunks have no second."""
    interaction = make(name)
    if "estimator" in options and name not in contract.MERGING:
        pytest.skip("it is refused")
    if not contract.takes(interaction, **options):
        pytest.skip("it is refused")
    inputs = [x[:, :1, :2].detach().requires_grad_() for x in inputs_of(interaction, len(SMALL))]

    def function(*tensors: Tensor) -> Tensor:  # parameters are moved where they are
        return op(interaction, list(tensors[: len(inputs)]), batch=SMALL, batch_size=2, **options)

    everything = [*inputs, *contract.parameters_of(interaction)]
    assert torch.autograd.gradcheck(function, everything, fast_mode=True)
    if "chunk_batches" not in options:
        assert torch.autograd.gradgradcheck(function, everything, fast_mode=True)
        return
    first = torch.autograd.grad
    with pytest.raises(NotImplementedError, match="chunk_batches has first derivatives only"):
        first(function(*inputs).sum(), inputs, create_graph=True)


class _Selfish(rb.interactions.Pairwise, nn.Module):
    """A sum in which the weight of the token itself is learned, and no other: `Σ_{j≠i} σ(q_i·k_j) v_j + c v_i`."""

    name, kind = "selfish", Kind.SUM

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def pair(self, block: Any, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(self._same(query), self.c, self._others(query, key))

    def partial(self, block: Any, *projected: Tensor) -> Partial:
        query, key, value = projected
        pairs = self._others(query, key).masked_fill(self._same(query), 0.0)
        return Partial(torch.einsum("mqhp,mphe->mqhe", pairs, value), None)

    def _others(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.sigmoid(torch.einsum("mqhd,mphd->mqhp", query, key))

    def _same(self, query: Tensor) -> Tensor:
        return torch.eye(query.shape[1], dtype=torch.bool).unsqueeze(1)


@pytest.mark.parametrize("options", contract.MODES.values(), ids=contract.MODES)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_that_only_the_token_itself_reads(options: dict, frozen: bool) -> None:
    """Its gradient is there in every mode, whether or not the inputs have one."""
    interaction = _Selfish()
    inputs = [x.requires_grad_(not frozen) for x in inputs_of(interaction)]
    met = contract.met_in(N, 4, options.get("rounds", 1), GRAPHS, seed=3)
    outs = op(interaction, inputs, batch=GRAPHS, **options), contract.estimate(interaction, inputs, met, 0.0, GRAPHS)
    found, want = (torch.autograd.grad(out.sin().sum(), interaction.c, allow_unused=True) for out in outs)
    close(found, want)


# Numbers


@every
@pytest.mark.parametrize("options", contract.MODES.values(), ids=contract.MODES)
def test_nan_stays_where_it_belongs(name: str, options: dict) -> None:
    """Those that meet the token get it, or some of them; no other does, and no other graph."""
    interaction = make(name)
    if not contract.takes(interaction, **options):
        pytest.skip("it is refused")
    inputs = [x.detach() for x in inputs_of(interaction)]
    meets = contract.met_in(N, 4, options.get("rounds", 1), GRAPHS, seed=3, averages=interaction.averages)[1]
    meets = GRAPHS[1] == GRAPHS if interaction.statistics else meets
    meets[1] = True
    clean = op(interaction, inputs, batch=GRAPHS, **options)
    for position in range(len(inputs)):
        spoilt = [x.clone() for x in inputs]
        spoilt[position][1] = torch.nan
        out = op(interaction, spoilt, batch=GRAPHS, **options)
        assert out[1].isnan().all()
        close(out[~meets], clean[~meets])


@every
@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("estimator", contract.DELTA)
def test_hardly_any_token(name: str, n: int, estimator: str) -> None:
    if (estimator, name) in contract.REFUSED:
        pytest.skip("it is refused")
    interaction = make(name)
    for options in ({}, {"rounds": 3}, {"chunk_batches": 1}, {"rounds": 3, "chunk_batches": 1}):
        if not contract.takes(interaction, **options):
            continue
        for batch in (None, torch.arange(n)):
            inputs = inputs_of(interaction, n)
            out = op(interaction, inputs, estimator=estimator, batch=batch, **options)
            want = definition(interaction, inputs, batch) if n else inputs[-1]
            found = results(out, inputs, interaction)
            close(found, results(want, inputs, interaction))


@every_merging
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["plain", "debiased"])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("chunk", [None, 2])
def test_it_errs_as_the_formula_does(
    name: str, dtype: torch.dtype, estimator: str, rounds: int, chunk: int | None
) -> None:
    """At most twice as much against float64 as the formula in fp32, rounded once to the dtype of the values."""
    if not contract.takes(make(name), rounds, chunk):
        pytest.skip("it is refused")
    exact, wide, narrow = make(name), make(name, torch.float32), make(name, dtype)
    for module in (exact, wide, narrow):
        for parameter in contract.parameters_of(module):
            parameter.data.fill_(0.25).requires_grad_(False)
    inputs = [x.detach() for x in inputs_of(narrow, 60, dtype=dtype)]
    met = contract.met_in(60, 8, rounds, None, seed=3)

    def formula(interaction: Interaction, dtype: torch.dtype) -> Tensor:
        return contract.estimate(interaction, [x.to(dtype) for x in inputs], met, contract.DELTA[estimator])

    want = formula(exact, torch.float64)
    allowed = 2 * (formula(wide, torch.float32).to(dtype).double() - want).norm()
    out = op(narrow, inputs, batch_size=8, rounds=rounds, estimator=estimator, chunk_batches=chunk)
    assert out.dtype == dtype
    assert (out.double() - want).norm() <= allowed
