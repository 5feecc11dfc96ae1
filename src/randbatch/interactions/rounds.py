"""Several rounds merged into one output: the only place where that is done, whatever the interaction.

`y_i = (κ^δ Σ_{j∈S_i} w_ij v_j + w_ii v_i) / (κ^δ Σ_{j∈S_i} w_ij + w_ii)`, S_i the others that token i met in any round
and κ = (n − 1) / |S_i| for a set of n tokens; without the denominator for interactions that do not normalise. δ = 0 is
plain, δ = 1 debiased; once all were met, κ = 1 and it is the full interaction. No pair may meet twice.

Rounds are computed one by one, forward and backward, all tokens at once or a few batches at a time, so that memory does
not grow with their number.

Shape letters: N tokens, n tokens of a chunk, G sets, H heads, D head size, E size of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._autograd import is_transformed, pull_back, refuse_second_derivative
from randbatch._numerics import wide_dtype
from randbatch._rows import gather_rows, scatter_rows
from randbatch._shapes import Shaped
from randbatch.closure import Closure, mark
from randbatch.interactions.base import Block, Debias, Interaction, Sets, log_weight
from randbatch.interactions.merge import Partial
from randbatch.interactions.options import Options
from randbatch.partition import Partition, Partitions
from randbatch.streaming import CHUNKS_ONCE, Gradients, Replay, refuse_chunks

__all__ = ["Debias", "Projections", "average_rounds", "mean", "merge_rounds"]


def _same(*tensors: Tensor) -> Sequence[Tensor]:
    return tensors


def _same_output(out: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class Projections:
    """Tokens, and what is done with single ones before and after the interaction.

    Attributes:
        tensors: `[N, …]`, what there is of every token.
        sizes: heads and head size of every projection.
        project: from rows of `tensors` to the projections `[n, H, D]`.
        finish: from the interaction's output `[n, H, E]` to the output `[n, …]`.
        owner: the module that `project` and `finish` belong to.
        elements: how many elements a token has from `tensors` to the output, all together.
    """

    tensors: Sequence[Tensor]
    sizes: Sequence[tuple[int, int]] = ()
    project: Callable[..., Sequence[Tensor]] = _same
    finish: Callable[[Tensor], Tensor] = _same_output
    owner: nn.Module | None = None
    elements: int = 0

    @classmethod
    def of(cls, tensors: Sequence[Shaped[Tensor, "*n h _"]]) -> Projections:
        """Tokens that are projected already."""
        sizes = [(x.shape[-2], x.shape[-1]) for x in tensors]
        return cls(tensors, sizes, elements=2 * sum([heads * size for heads, size in (sizes[0], sizes[-1])]))

    @property
    def is_projected(self) -> bool:
        """Whether the tensors are the projections themselves."""
        return self.project is _same


def average_rounds(
    interaction: Interaction, tensors: Sequence[Tensor], rounds: Iterable[Partition], options: Options
) -> Tensor:
    """The mean of the outputs of several partitions, for interactions that have nothing to merge."""
    return mean(interaction.in_batches(part, tensors, options) for part in rounds)


def mean(outs: Iterable[Tensor]) -> Tensor:
    """The mean of some tensors, of which there is at least one; no more than two are held."""
    total, number = None, 0
    for out in outs:
        total, number = out if total is None else total + out, number + 1
    assert total is not None
    return total if number == 1 else total / number


def merge_rounds(
    interaction: Interaction,
    projections: Projections,
    rounds: Partitions,
    debias: Debias,
    options: Options,
    chunk: int | None = None,
) -> Shaped[Tensor, "n ..."]:
    """The formula above, in token order, before `projections.finish`.

    Args:
        interaction: a sum over pairs.
        projections: the tokens; without `chunk` they are projected already.
        rounds: no pair meets twice. They are iterated once in forward and once in backward.
        debias: δ.
        options: how to compute.
        chunk: batches at a time. Default: all at once.
    """
    if rounds.num_tokens == 0:
        return projections.project(*projections.tensors)[-1].clone()
    has_parameters = isinstance(interaction, nn.Module)
    if chunk is None and (options.dropout_p > 0 or is_transformed() or has_parameters or interaction.statistics):
        return _merge_by_autograd(interaction, projections.tensors, rounds, debias, options)
    job = _Job(interaction, projections, rounds, debias, options, chunk)
    if chunk is not None:
        refuse_chunks(projections.owner)
        owner = interaction.owner_beside(projections.owner)
        job.closure = Closure(owner)
        job.replay = Replay(projections.tensors, owner)
        if torch.is_grad_enabled():
            _find_closure(job)
    out: Any = _MergeRounds.apply(job, *projections.tensors, *job.reads())
    return out


def _merge_by_autograd(
    interaction: Interaction, tensors: Sequence[Tensor], rounds: Partitions, debias: Debias, options: Options
) -> Tensor:
    """The same recorded by autograd, which keeps what every round computed: with dropout, and for every derivative."""
    total: Partial | None = None
    met = 0
    first = rounds.first
    for part in rounds:
        more = interaction.others(part, tensors, options)
        total = more if total is None else total.merge(more)
        met = met + part.unpack(part.count_met())
    assert total is not None  # there is at least one round
    weight = log_weight(first, first.unpack(first.count_others()), torch.as_tensor(met), debias)
    out = total.weigh(weight).merge(interaction.alone(first, tensors, options)).out
    return out.to(tensors[-1].dtype)


Rows = Tensor | None
"""Some of the tokens, int64 `[n]`; None for all, in their order."""


def _take(x: Shaped[Tensor, "n ..."], rows: Rows) -> Tensor:
    return x if rows is None else gather_rows(x, rows)


@dataclass
class _Job:
    """What is computed over several rounds."""

    interaction: Interaction
    projections: Projections
    rounds: Partitions
    debias: Debias
    options: Options
    chunk: int | None
    closure: Closure | None = None
    replay: Replay | None = None

    def pieces(self) -> Iterator[tuple[Rows, Partition]]:
        """The tokens and the batches that are computed at a time, of every round."""
        for part in self.rounds:
            if self.chunk is None:
                yield None, part
            else:
                yield from part.chunks(self.chunk)

    def slices(self) -> Iterator[tuple[Rows, Block]]:
        """All tokens by themselves, as many at a time as a chunk has."""
        first = self.rounds.first
        sets = Sets.of(first)
        if self.chunk is None:
            yield None, Block(self.options, sets.sizes, sets.number)
            return
        positions = torch.arange(first.num_tokens, device=first.order.device)
        for rows in positions.split(self.chunk * first.num_slots):
            yield rows, Block(self.options, sets.sizes, None if sets.number is None else sets.number[rows])

    def project(self, rows: Rows) -> Sequence[Tensor]:
        """The projections of some tokens."""
        return self.projections.project(*(_take(x, rows) for x in self.projections.tensors))

    def reads(self) -> list[Tensor]:
        """The tensors beside the tokens by which there is to differentiate."""
        return [] if self.closure is None else self.closure.tensors

    def first(self) -> AbstractContextManager[object]:
        """Around the forward pass."""
        return nullcontext() if self.replay is None else self.replay.first()

    def again(self) -> AbstractContextManager[object]:
        """Around the backward pass."""
        return nullcontext() if self.replay is None else self.replay.again()


def _find_closure(job: _Job) -> None:
    """Compute one chunk to see by what there is to differentiate."""
    assert job.replay is not None and job.closure is not None
    rows, piece = next(job.pieces())
    own = [_take(x.detach(), rows).requires_grad_(x.requires_grad) for x in job.projections.tensors]
    with job.replay.again():  # it draws no random number that counts
        job.closure.prepare()
        since = mark()
        outs = list(job.projections.project(*own))
        if isinstance(job.interaction, nn.Module):
            projected = list(outs)
            outs.append(job.interaction.others(piece, projected, job.options).out)
            outs.append(job.interaction.alone(piece, projected, job.options).out)
        job.closure.find(outs, own, since)


class _MergeRounds(torch.autograd.Function):
    """Every chunk of every round is computed again in backward; saved are the input and the merged output."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *saved: Tensor) -> Tensor:
        with job.first():
            total, weight, dtype = _merge(job)
        out = total.out.to(dtype)
        ctx.save_for_backward(*saved, out, total.log_norm, weight)
        ctx.job = job
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        job: _Job = ctx.job
        *saved, out, log_norm, weight = ctx.saved_tensors
        if job.chunk is None and torch.is_grad_enabled():
            return None, *_differentiate_again(job, saved, grads[0])
        refuse_second_derivative("chunk_batches", CHUNKS_ONCE)
        num_tensors = len(job.projections.tensors)
        totals = Gradients(saved[:num_tensors], job.reads(), ctx.needs_input_grad[1:], several=True)
        # the others were weighed by exp(weight): what was merged, seen from before that
        unweighed = None if log_norm is None else log_norm - weight
        with job.again():
            for rows, piece in job.pieces():
                inputs, projected = _project(totals, job, rows)
                grad, own_out, own_weight = (_take(x, rows) for x in (grads[0], out, weight))
                norm = None if unweighed is None else _take(unweighed, rows)
                found = _pull_back_others(job, piece, projected, grad, own_out, norm, own_weight)
                totals.add(rows, inputs, *found, job.closure)
            for rows, block in job.slices():
                inputs, projected = _project(totals, job, rows)
                norm = None if log_norm is None else _take(log_norm, rows)
                found = _pull_back_own(job, block, projected, _take(grads[0], rows), _take(out, rows), norm)
                totals.add(rows, inputs, *found, job.closure)
        return None, *totals.all()


def _differentiate_again(job: _Job, saved: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """The gradients while autograd records them, by the formula in plain torch."""

    def formula(*tensors: Tensor) -> Tensor:
        return _merge_by_autograd(job.interaction, tensors, job.rounds, job.debias, job.options.differentiable())

    return pull_back(formula, saved, (grad,))


def _project(totals: Gradients, job: _Job, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    with torch.enable_grad():
        inputs = totals.rows(rows)
        return inputs, list(job.projections.project(*inputs))


class _Running:
    """What tokens met so far, and how many they were."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self.partial: Partial | None = None
        self._met = self._others = torch.zeros((), dtype=torch.int64)

    def add(self, rows: Rows, more: Partial, part: Partition) -> None:
        """What some tokens got from the others of their batches."""
        met, others = part.unpack(part.count_met()), part.unpack(part.count_others())
        if rows is None:
            self._met, self._others = self._met.to(met.device) + met, others
            self.partial = more if self.partial is None else self.partial.merge(more)
            return
        if self.partial is None:
            self._met, self._others = met.new_zeros(self._num_tokens), met.new_zeros(self._num_tokens)
            self.partial = self._nothing(more)
        self._met.index_add_(0, rows, met)
        self._others.index_copy_(0, rows, others)
        self._write(rows, more)

    def _nothing(self, like: Partial) -> Partial:
        """Contributions of no token to any, in at least fp32."""
        out, log_norm = like
        zeros = out.new_zeros(self._num_tokens, *out.shape[1:], dtype=wide_dtype(out))
        if log_norm is None:
            return Partial(zeros, None)
        return Partial(zeros, log_norm.new_full((self._num_tokens, *log_norm.shape[1:]), -torch.inf))

    def weigh(self, first: Partition, debias: Debias) -> Tensor:
        """Let those that were met stand for all others: `δ log κ`, by which they were weighed."""
        assert self.partial is not None  # there is at least one batch
        weight = log_weight(first, self._others, self._met, debias)
        kept = self.partial.out if self.partial.log_norm is None else self.partial.log_norm
        weight = weight.to(wide_dtype(kept))
        self.partial = self.partial.weigh(weight)
        return weight

    def finish(self, rows: Rows, own: Partial) -> None:
        """Add what tokens get from themselves."""
        assert self.partial is not None
        if rows is None:
            self.partial = self.partial.merge(own)
        else:
            self._write(rows, own)

    def _write(self, rows: Tensor, more: Partial) -> None:
        assert self.partial is not None
        out, log_norm = self.partial
        before = Partial(gather_rows(out, rows), None if log_norm is None else gather_rows(log_norm, rows))
        merged = before.merge(more)
        scatter_rows(out, rows, merged.out.to(out.dtype))
        if log_norm is not None and merged.log_norm is not None:
            scatter_rows(log_norm, rows, merged.log_norm.to(log_norm.dtype))


def _merge(job: _Job) -> tuple[Partial, Tensor, torch.dtype]:
    """The merged output, the weight δ log κ of those that were met, and the dtype of the values."""
    running = _Running(job.rounds.num_tokens)
    for rows, piece in job.pieces():
        running.add(rows, job.interaction.others(piece, job.project(rows), job.options), piece)
    weight = running.weigh(job.rounds.first, job.debias)
    dtype = job.projections.tensors[0].dtype
    for rows, block in job.slices():
        projected = job.project(rows)
        dtype = projected[-1].dtype
        running.finish(rows, job.interaction.own(block, *projected))
    assert running.partial is not None
    return running.partial, weight, dtype


def _pull_back_others(
    job: _Job,
    piece: Partition,
    projected: Sequence[Tensor],
    grad: Tensor,
    out: Tensor,
    log_norm: Tensor | None,
    weight: Tensor,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Tensors and their gradients, for the others that were met in one chunk of one round.

    `out` and `log_norm` are those of all rounds. With `a = exp(log_norm_piece − log_norm)` the piece's own output has
    the gradient a g and its log-norm a g·(out_piece − out); a sum has the gradient exp(weight) g.
    """
    found = job.interaction.others_backward(
        piece, [x.detach() for x in projected], job.options, grad, Partial(out, log_norm)
    )
    if found is not None:
        return projected, found
    with torch.enable_grad():
        more = job.interaction.others(piece, projected, job.options)
    with torch.no_grad():
        return _gradients(more, grad, out, log_norm, weight)


def _pull_back_own(
    job: _Job, block: Block, projected: Sequence[Tensor], grad: Tensor, out: Tensor, log_norm: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The same for what each token gets from itself."""
    with torch.enable_grad():
        own = job.interaction.own(block, *projected)
    with torch.no_grad():
        return _gradients(own, grad, out, log_norm, None)


def _gradients(
    more: Partial, grad: Tensor, out: Tensor, log_norm: Tensor | None, weight: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The outputs of a contribution and their gradients, from that of the merged output."""
    if more.log_norm is None or log_norm is None:
        share = grad if weight is None else grad * weight.exp().unsqueeze(-1)
        return [more.out], [share.to(more.out.dtype)]
    share = (more.log_norm - log_norm).exp().unsqueeze(-1) * grad
    return [more.out, more.log_norm], [share.to(more.out.dtype), (share * (more.out - out)).sum(dim=-1)]
