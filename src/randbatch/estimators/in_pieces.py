"""The estimators on a few batches at a time: what `streaming` does with them.

Between the tokens and the output stand two functions of single tokens, `project` to query, key and value and `finish`
from the attention to the output. In a piece they are computed with the attention, so that queries, keys and values of
all tokens are never held.

Shape letters: N tokens, n tokens of a piece, H heads, D head size of query and key, Dv of value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randbatch._autograd import refuse_second_derivative
from randbatch._rows import put_rows, take_rows
from randbatch._shapes import Float, Int
from randbatch.closure import Closure, mark
from randbatch.estimators import pick_estimator
from randbatch.estimators.met import log_kappa, merge, own_logit
from randbatch.interactions import Options
from randbatch.kernels import Backend, Problem, pick_backend
from randbatch.orthogonal import OrthogonalRounds, Rounds
from randbatch.partition import Partition
from randbatch.streaming import CHUNKS_ONCE, ChunkBatches, Gradients, Replay, piece_size, refuse_chunks, stream

__all__ = ["Pipeline", "check_streams", "estimate_in_pieces"]

_LOGITS = 5  # logits, weights, mask, and the gradients of two of them
_COPIES = 5  # of what a token is: itself, its gradient, what is turned for the kernel, sums; measured 4.8


def _as_it_is(*tensors: Any) -> Any:
    return tensors


def _same(out: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class Pipeline:
    """What is done with single tokens before and after the attention.

    Attributes:
        tensors: `[N, …]`, what there is of a token.
        project: from rows of `tensors` to query, key `[n, H, D]` and value `[n, H, Dv]`.
        finish: from the attention `[n, H, Dv]` to the output `[n, …]`.
        owner: the module that `project` and `finish` belong to.
        numbers: how many numbers a token is from `tensors` to the output, all together.
    """

    tensors: Sequence[Tensor]
    numbers: int
    project: Callable[..., Sequence[Tensor]] = _as_it_is
    finish: Callable[[Tensor], Tensor] = _same
    owner: nn.Module | None = None


def check_streams(chunk_batches: ChunkBatches, estimator: str) -> None:
    """Refuse what has no pieces."""
    if chunk_batches is not None and estimator == "corrected":
        raise ValueError(
            "chunk_batches must be None with estimator 'corrected', whose mean fields and exact tokens need the "
            f"keys and values of all batches at once; got {chunk_batches!r}"
        )


def estimate_in_pieces(
    pipeline: Pipeline,
    rounds: Rounds,
    estimator: str,
    interaction: str,
    options: Options,
    chunk_batches: ChunkBatches,
    num_heads: int,
) -> Tensor:
    """`finish(estimator(project(tensors)))`, in pieces of `chunk_batches` batches; the same numbers to rounding.

    One round keeps nothing but its input. Several keep the merged attention `[N, H, Dv]` and its log-sum-exp, and
    project the tokens again in each round; `finish` then runs on all tokens at once.
    """
    check_streams(chunk_batches, estimator)
    attend = pick_estimator(estimator)
    assert chunk_batches is not None
    if isinstance(rounds, Partition):
        chunk = piece_size(chunk_batches, rounds, _bytes_of_a_token(pipeline, rounds, num_heads, interaction, options))

        def of_piece(piece: Partition, *rows: Tensor) -> Tensor:
            query, key, value = pipeline.project(*rows)
            return pipeline.finish(attend(query, key, value, piece, interaction, options))

        return stream(of_piece, rounds, pipeline.tensors, chunk, pipeline.owner)
    if interaction != "softmax":
        raise ValueError(
            f"chunk_batches must be None with several rounds of interaction {interaction!r}; got {chunk_batches!r}"
        )
    first = next(iter(rounds))
    chunk = piece_size(chunk_batches, first, _bytes_of_a_token(pipeline, first, num_heads, interaction, options))
    return pipeline.finish(_attend_in_pieces(pipeline, rounds, 1.0 if estimator == "debiased" else 0.0, options, chunk))


def _bytes_of_a_token(pipeline: Pipeline, part: Partition, num_heads: int, interaction: str, options: Options) -> int:
    """An estimate of what backward holds of each token of a piece."""
    size = max(pipeline.tensors[0].element_size(), 4)
    stored = options.dropout_p > 0 or options.backend == "reference"
    logits = num_heads * part.num_slots * _LOGITS if interaction == "softmax" and stored else 0
    return size * (_COPIES * pipeline.numbers + logits)


@dataclass(frozen=True)
class _Job:
    """What is attended to, over several rounds."""

    pipeline: Pipeline
    rounds: OrthogonalRounds
    debias: float
    options: Options
    chunk: int
    replay: Replay
    closure: Closure

    def pieces(self) -> Iterator[tuple[Int[Tensor, " n"], Partition]]:
        """Every piece of every round."""
        for part in self.rounds:
            yield from part.chunks(self.chunk)

    def slices(self) -> Iterator[Int[Tensor, " n"]]:
        """All tokens, as many at a time as a piece has."""
        first = next(iter(self.rounds))
        positions = torch.arange(first.num_tokens, device=first.order.device)
        return iter(positions.split(self.chunk * first.num_slots))

    def backend_of(self, query: Tensor, value: Tensor) -> tuple[Backend, Problem]:
        """Who attends to the others, and what is asked."""
        options = self.options
        problem = Problem.of(query, value, options.scale, options.dropout_p, need_lse=True, exclude_self=True)
        return pick_backend(options.backend, problem), problem


def _attend_in_pieces(
    pipeline: Pipeline, rounds: OrthogonalRounds, debias: float, options: Options, chunk: int
) -> Float[Tensor, "n h dv"]:
    """As `attend_to_met`."""
    if rounds.num_tokens == 0:
        return pipeline.project(*pipeline.tensors)[2]
    refuse_chunks(pipeline.owner)
    replay, closure = Replay(pipeline.tensors, pipeline.owner), Closure(pipeline.owner)
    job = _Job(pipeline, rounds, debias, options, chunk, replay, closure)
    if torch.is_grad_enabled():
        _find_closure(job)
    out: Any = _AttendInPieces.apply(job, *pipeline.tensors, *closure.tensors)
    return out


def _find_closure(job: _Job) -> None:
    """Project the tokens of one piece to see by what there is to differentiate."""
    rows = next(job.slices())
    own = [take_rows(x.detach(), rows).requires_grad_(x.requires_grad) for x in job.pipeline.tensors]
    with job.replay.again():  # it draws no random number that counts
        job.closure.prepare()
        since = mark()
        job.closure.find(list(job.pipeline.project(*own)), own, since)


class _AttendInPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, *saved: Tensor) -> Tensor:
        with job.replay.first():
            out, lse, weight, dtype = _merge_pieces(job)
        out = out.to(dtype)
        ctx.save_for_backward(*saved, out, lse, weight)
        ctx.job = job
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("chunk_batches", CHUNKS_ONCE)
        job: _Job = ctx.job
        *saved, out, lse, weight = ctx.saved_tensors
        totals = Gradients(saved[: len(job.pipeline.tensors)], job.closure.tensors, ctx.needs_input_grad[1:])
        with job.replay.again():
            for rows, piece in job.pieces():
                inputs, projected = _project(totals, job, rows)
                used = job.closure.used(projected, inputs)
                merged = [take_rows(x, rows) for x in (grads[0], out, lse - weight)]
                totals.add(rows, inputs, *_pull_back(job, piece, projected, *merged), used)
            for rows in job.slices():
                inputs, projected = _project(totals, job, rows)
                merged = [take_rows(x, rows) for x in (grads[0], out, lse)]
                used = job.closure.used(projected, inputs)
                totals.add(rows, inputs, projected, _pull_back_own(job, projected, *merged), used)
        return None, *totals.all()


def _project(totals: Gradients, job: _Job, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    with torch.enable_grad():
        inputs = totals.rows(rows)
        return inputs, list(job.pipeline.project(*inputs))


def _merge_pieces(job: _Job) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """The merged attention and log-sum-exp, the weight δ log κ, and the dtype that the output is of."""
    tensors = job.pipeline.tensors
    out = lse = met = others = None
    dtype = tensors[0].dtype
    for rows, piece in job.pieces():
        q, k, v = job.pipeline.project(*(take_rows(x, rows) for x in tensors))
        more, more_lse = _attend(job, piece, (q, k, v))
        if out is None or lse is None or met is None or others is None:
            shape = (job.rounds.num_tokens, *more_lse.shape[1:])
            out = more.new_zeros(*shape, more.shape[-1], dtype=more_lse.dtype)
            lse = more_lse.new_full(shape, -torch.inf)
            met, others = (torch.zeros(shape[0], dtype=torch.int64, device=rows.device) for _ in range(2))
        merged = merge(take_rows(out, rows), take_rows(lse, rows), more, more_lse)
        put_rows(out, rows, merged[0])
        put_rows(lse, rows, merged[1])
        met.index_add_(0, rows, piece.count_met())
        others.index_copy_(0, rows, piece.count_others())
    assert out is not None and lse is not None and met is not None and others is not None
    weight = (job.debias * log_kappa(others, met).unsqueeze(1)).to(lse.dtype)
    for rows in job.slices():
        q, k, v = job.pipeline.project(*(take_rows(x, rows) for x in tensors))
        dtype = v.dtype
        own = own_logit(q, k, job.backend_of(q, v)[1].scale)
        kept = _kept(own, job.options.dropout_p)
        merged = merge(take_rows(out, rows), take_rows(lse + weight, rows), kept * v, own)
        put_rows(out, rows, merged[0])
        put_rows(lse, rows, merged[1])
    return out, lse, weight, dtype


def _attend(job: _Job, piece: Partition, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to the others of a batch, and its log-sum-exp; with dropout autograd knows it."""
    query, key, value = projected
    backend, problem = job.backend_of(query, value)
    if problem.dropout_p == 0:
        return backend.forward(query, key, value, piece, problem)
    out, lse = backend.attend(query, key, value, piece, problem, None)
    assert lse is not None  # it was asked for
    return out, lse


def _kept(own: Float[Tensor, "n h"], dropout_p: float) -> Float[Tensor, "n h 1"]:
    return F.dropout(torch.ones_like(own), dropout_p).unsqueeze(-1)


def _pull_back(
    job: _Job, piece: Partition, projected: Sequence[Tensor], grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Tensors and their gradients, for the others that were met in one piece of one round.

    `out` and `lse` are those of all rounds. With `a = exp(lse_piece − lse)` the piece's own output has the gradient a g
    and its log-sum-exp a g·(out_piece − out).
    """
    if job.options.dropout_p > 0:
        with torch.enable_grad():
            more, more_lse = _attend(job, piece, projected)
        with torch.no_grad():
            share = (more_lse - lse).exp().unsqueeze(-1) * grad
            return [more, more_lse], [share.to(more.dtype), (share * (more - out)).sum(dim=-1)]
    query, key, value = (x.detach() for x in projected)
    backend, problem = job.backend_of(query, value)
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    backend.backward(grad, query, key, value, out, lse, piece, problem, grads)
    return projected, grads


def _pull_back_own(
    job: _Job, projected: Sequence[Tensor], grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value from each token's own weight."""
    query, key, value = (x.detach() for x in projected)
    scale = job.backend_of(query, value)[1].scale
    logit = own_logit(query, key, scale)
    kept = _kept(logit, job.options.dropout_p)
    own = (logit - lse).exp().unsqueeze(-1)
    to_logit = own * (grad.to(own.dtype) * (kept * value - out)).sum(dim=-1, keepdim=True) * scale
    grads = to_logit * key, to_logit * query, own * kept * grad
    to_query, to_key, to_value = (g.to(x.dtype) for g, x in zip(grads, projected, strict=True))
    return to_query, to_key, to_value
