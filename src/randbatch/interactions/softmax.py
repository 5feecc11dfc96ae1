"""Softmax attention inside each batch, by the fastest backend that can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._numerics import logit_scale, wide_dtype
from randbatch._shapes import Float, Shaped
from randbatch.interactions.base import Block, Debias, Interaction, Kind, is_zero
from randbatch.interactions.merge import Partial, log_kappa
from randbatch.interactions.options import Options
from randbatch.kernels import Backend, OwnShift, Problem, pick_backend, reference, why_not
from randbatch.kernels.exact import attend_exactly
from randbatch.partition import Partition

__all__ = ["Softmax"]

_LOGITS = 5  # logits, weights, mask, and the gradients of two of them


class Softmax(Interaction):
    """`y_i = Σ_j softmax_j(scale · q_i·k_j) v_j`, scale 1/√D by default: the attention of transformers.

    It is computed by a backend (`randbatch.kernels`), on the tokens where they stand.

    Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762.
    """

    name = "softmax"
    kind = Kind.RATIO
    has_scale = has_dropout = has_backends = is_exponential = can_trace = True

    def attend(self, block: Block, *projected: Float[Tensor, "m p h _"]) -> Float[Tensor, "m p h e"]:
        """The definition, in plain torch."""
        query, key, value = projected
        problem = Problem.of(query, value, block.options.scale, block.options.dropout_p)
        return reference.attend(query, key, value, problem)[0]

    def partial(self, block: Block, *projected: Float[Tensor, "m p h _"]) -> Partial:
        """The same without the token itself, in plain torch."""
        query, key, value = projected
        options = block.options
        problem = Problem.of(query, value, options.scale, options.dropout_p, need_lse=True, exclude_self=True)
        return Partial(*reference.attend(query, key, value, problem))

    def own(self, block: Block, *projected: Float[Tensor, "n h _"]) -> Partial:
        """A token's value, and its logit with itself in at least fp32."""
        query, key, value = projected
        scale = logit_scale(block.options.scale, query.shape[-1])
        logit = (query.to(wide_dtype(query)) * key).sum(dim=-1) * scale
        if block.options.dropout_p > 0:
            value = F.dropout(torch.ones_like(logit), block.options.dropout_p).unsqueeze(-1) * value
        return Partial(value, logit)

    def elements_per_token(self, width: int, sizes: Sequence[tuple[int, int]], like: Tensor, options: Options) -> int:
        """The logits of a row, where the backend stores them or weights are dropped."""
        (heads, size), *_, (_, value_size) = sizes
        problem = Problem.of_sizes(like, size, value_size, options.scale, options.dropout_p)
        stored = options.dropout_p > 0 or pick_backend(options.backend, problem).stores_logits
        return _LOGITS * heads * width if stored else 0

    def in_batches(
        self,
        part: Partition,
        projected: Sequence[Shaped[Tensor, "n ..."]],
        options: Options,
        debias: Debias = 0.0,
    ) -> Shaped[Tensor, "n ..."]:
        """κ is the same for all tokens of a batch, so a shift of the own logit does what `debias` asks for."""
        query, key, value = projected
        problem = Problem.of(query, value, options.scale, options.dropout_p)
        shift = None if is_zero(debias) else _own_shift(part, query, debias)
        return pick_backend(options.backend, problem).attend(query, key, value, part, problem, shift)[0]

    def in_full(
        self, whole: Partition, projected: Sequence[Shaped[Tensor, "n ..."]], options: Options
    ) -> Shaped[Tensor, "n ..."]:
        """In chunks of queries where the logits of a whole set would be stored; without dropout, whatever backend."""
        query, key, value = projected
        return attend_exactly(query, key, value, whole, Problem.of(query, value, options.scale))

    def backends(
        self, like: Tensor, sizes: Sequence[tuple[int, int]], options: Options, *, merged: bool
    ) -> Iterator[tuple[Backend, str | None]]:
        """The backends that are tried for projections of these sizes, with the reason why each cannot run."""
        (_, size), *_, (_, value_size) = sizes
        problem = Problem.of_sizes(
            like, size, value_size, options.scale, options.dropout_p, need_lse=merged, exclude_self=merged
        )
        return why_not(options.backend, problem)

    def others(
        self, part: Partition, projected: Sequence[Tensor], options: Options, blocks: Sequence[Block] | None = None
    ) -> Partial:
        """By a backend; without the logits where no gradient is wanted."""
        backend, problem = _backend_of_others(projected, options)
        query, key, value = projected
        compute: Any = backend.attend if problem.dropout_p > 0 or torch.is_grad_enabled() else backend.forward
        return Partial(*compute(query, key, value, part, problem))

    def others_backward(
        self, part: Partition, projected: Sequence[Tensor], options: Options, grad: Tensor, total: Partial
    ) -> tuple[Tensor, ...] | None:
        """By a backend, from the output and the log-sum-exp of all rounds."""
        if options.dropout_p > 0:
            return None
        query, key, value = projected
        backend, problem = _backend_of_others(projected, options)
        grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        assert total.log_norm is not None  # softmax normalises
        backend.backward(grad, query, key, value, total.out, total.log_norm, part, problem, grads)
        return grads


def _backend_of_others(projected: Sequence[Tensor], options: Options) -> tuple[Backend, Problem]:
    query, _, value = projected
    problem = Problem.of(query, value, options.scale, options.dropout_p, need_lse=True, exclude_self=True)
    return pick_backend(options.backend, problem), problem


def _own_shift(part: Partition, query: Tensor, debias: Debias) -> OwnShift:
    """−δ log κ, for each batch, or for all of a width where there is one set."""
    wide = wide_dtype(query)
    delta = torch.as_tensor(debias, device=query.device, dtype=wide)
    delta = delta.expand(query.shape[1]) if delta.dim() < 2 else delta  # [H] or [G, H]
    if part.set_of_batch is None or part.set_sizes is None:
        width = torch.tensor([width for _, width in part.groups]).to(query.device, non_blocking=True)
        kappa = log_kappa(torch.full_like(width, part.set_size - 1), width - 1)
        rows = [1] * len(part.groups)
    else:
        kappa = log_kappa(part.set_sizes[part.set_of_batch] - 1, part.starts_and_widths()[1] - 1)
        rows = [rows for rows, _ in part.groups]
        delta = delta[part.set_of_batch] if delta.dim() == 2 else delta
    return (-kappa.to(wide).unsqueeze(1) * delta).split(rows)
