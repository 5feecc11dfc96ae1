"""Projection, attention in random batches, projection on a CPU: one function, a few batches at a time.

A piece of the tokens passes through all three while the cache holds it, so that queries, keys and values of all tokens
are never in memory. Backward projects a piece once more. Kept are the input, the attention and its log-sum-exp.

A GPU has the memory bandwidth to do without, and its fused kernel takes the tokens where they stand.

Shape letters: N tokens, n tokens of a piece, C channels, H heads, D = C / H head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._autograd import is_transformed, pull_back
from randbatch._shapes import Float, Int
from randbatch.execution.call import Call, LinearProjections
from randbatch.execution.table import Strategy
from randbatch.kernels import BACKENDS, Backend, Problem, pick_backend, resolve_backend
from randbatch.kernels.cpu import scatter_rows
from randbatch.partition import Partition

__all__ = ["Projected", "batches_of_a_chunk"]

_BYTES = 2**20  # of queries, keys and values of a piece, for each thread; up to 16 MiB took about the same time
_BATCHES = 4  # of a piece, for each thread, lest one waits for another


def batches_of_a_chunk(batch_size: int, channels: int, dtype: torch.dtype) -> int:
    """How many batches are computed at a time."""
    return torch.get_num_threads() * max(_BATCHES, _BYTES // (3 * channels * dtype.itemsize * batch_size))


@dataclass(frozen=True)
class _Attention:
    """What happens between the projections."""

    part: Partition
    num_heads: int
    backend: Backend
    problem: Problem
    num_batches: int

    def pieces(self) -> Iterator[tuple[Int[Tensor, " n"], Partition]]:
        """At most `num_batches` batches at a time, the same in backward, however many threads there are by then."""
        return self.part.chunks(self.num_batches)

    def split(self, x: Float[Tensor, "n c"], parts: int = 1) -> tuple[Float[Tensor, "n h d"], ...]:
        """What stands side by side: query, key and value, and the heads of each."""
        return x.unflatten(1, (parts, self.num_heads, -1)).unbind(1)

    def formula(
        self,
        x: Float[Tensor, "n c"],
        in_weight: Float[Tensor, "c3 c"],
        out_weight: Float[Tensor, "c c"],
        *biases: Tensor,
        of_input: bool,
        of_output: bool,
    ) -> Float[Tensor, "n c"]:
        """The same in plain torch; there may be a bias of the input projection, of the output projection, or both."""
        given = list(biases)
        in_bias = given.pop(0) if of_input else None
        out_bias = given.pop(0) if of_output else None
        query, key, value = self.split(F.linear(x, in_weight, in_bias), 3)
        problem = replace(self.problem, need_lse=False)
        out, _ = BACKENDS["reference"].attend(query, key, value, self.part, problem, None)
        return F.linear(out.flatten(1), out_weight, out_bias)


class _Workspace:
    """Tensors of a piece by name, written over by the next piece: fresh memory takes as long as what is put there."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, num_tokens: int, channels: int) -> Float[Tensor, "n c"]:
        if name not in self._held:  # the first piece is the largest
            self._held[name] = self._like.new_empty(num_tokens, channels)
        return self._held[name][:num_tokens]

    def take(self, name: str, x: Float[Tensor, "all c"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n c"]:
        return torch.index_select(x, 0, rows, out=self(name, len(rows), x.shape[1]))

    def multiply(
        self, name: str, x: Float[Tensor, "n a"], factor: Float[Tensor, "a b"], bias: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "n b"]:
        into = self(name, len(x), factor.shape[1])
        return torch.mm(x, factor, out=into) if bias is None else torch.addmm(bias, x, factor, out=into)


def _forward(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    how: _Attention,
    saved: list[Tensor] | None,
) -> Tensor:
    """The output; `saved` gets the attention and its log-sum-exp of every chunk."""
    result, workspace = torch.empty_like(x), _Workspace(x)
    for rows, piece in how.pieces():
        projected = workspace.multiply("projected", workspace.take("x", x, rows), in_weight.mT, in_bias)
        query, key, value = how.split(projected, 3)
        out, lse = how.backend.forward(query, key, value, piece, how.problem)
        scatter_rows(result, rows, workspace.multiply("result", out.flatten(1), out_weight.mT, out_bias))
        if saved is not None:
            saved += out, lse
    return result


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        in_weight: Tensor,
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        how: _Attention,
    ) -> tuple[Tensor, ...]:
        saved: list[Tensor] = []
        return _forward(x, in_weight, in_bias, out_weight, out_bias, how, saved), *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.how = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        how: _Attention = ctx.how
        x, in_weight, in_bias, out_weight, out_bias, *kept = ctx.saved_tensors
        if grads[0] is None:  # what followed has no gradient
            return (None,) * 6
        if torch.is_grad_enabled():
            given = [x, in_weight, out_weight, *(bias for bias in (in_bias, out_bias) if bias is not None)]
            formula = partial(how.formula, of_input=in_bias is not None, of_output=out_bias is not None)
            found = iter(pull_back(formula, given, grads[:1]))
            to_x, to_in, to_out = next(found), next(found), next(found)
            to_in_bias, to_out_bias = (None if bias is None else next(found) for bias in (in_bias, out_bias))
            return to_x, to_in, to_in_bias, to_out, to_out_bias, None
        of_x, *of_parameters = ctx.needs_input_grad[:5]
        to_x = torch.empty_like(x) if of_x else None
        workspace = _Workspace(x)
        totals = [
            torch.zeros_like(parameter) if needed else None
            for parameter, needed in zip((in_weight, in_bias, out_weight, out_bias), of_parameters, strict=True)
        ]
        to_in, to_in_bias, to_out, to_out_bias = totals
        for (rows, piece), out, lse in zip(how.pieces(), kept[::2], kept[1::2], strict=True):
            rows_of_x, of_result = workspace.take("x", x, rows), workspace.take("of_result", grads[0], rows)
            projected = workspace.multiply("projected", rows_of_x, in_weight.mT, in_bias)
            query, key, value = how.split(projected, 3)
            (of_out,) = how.split(workspace.multiply("of_out", of_result, out_weight))
            of_projected = workspace("of_projected", *projected.shape)
            to_query, to_key, to_value = how.split(of_projected, 3)
            of_heads = to_query, to_key, to_value
            how.backend.backward(of_out, query, key, value, out, lse, piece, how.problem, of_heads)
            if to_x is not None:
                scatter_rows(to_x, rows, workspace.multiply("of_x", of_projected, in_weight))
            _add(to_in, to_in_bias, of_projected, rows_of_x)
            _add(to_out, to_out_bias, of_result, out.flatten(1))
        return to_x, *totals, None


def _add(to_weight: Tensor | None, to_bias: Tensor | None, grad: Float[Tensor, "n b"], x: Float[Tensor, "n a"]) -> None:
    """The gradients of weight `[b, a]` and bias `[b]` from that of `x` times weight plus bias."""
    if to_weight is not None:
        to_weight.addmm_(grad.mT, x)
    if to_bias is not None:
        to_bias.add_(grad.sum(dim=0))


class Projected(Strategy):
    """`W_o · concat_h Σ_{j∈C(i)} softmax_j(scale · q_i·k_j) v_j + b_o` on a CPU, in one function of single chunks."""

    name = "projected"

    def why_not(self, call: Call) -> str | None:
        """Two matrices, plain attention, one round, a CPU, fp32 or fp64.

        In half precision gradients of parameters that are added up chunk by chunk would be rounded at every chunk.
        """
        tokens = call.first
        if not isinstance(call.projections, LinearProjections):
            return "the projections are not two plain matrices of one tensor"
        if tokens.device.type != "cpu" or tokens.dtype not in (torch.float32, torch.float64):
            return f"it takes float32 and float64 on a CPU, got {tokens.dtype} on {tokens.device.type}"
        if torch.is_autocast_enabled("cpu"):
            return "autocast would round every chunk"
        if torch.compiler.is_compiling() or is_transformed():
            return "torch.compile and torch.func look into the operations of torch only"
        if call.rounds > 1 or not call.estimator.is_identity:
            return "it takes one round of the estimator 'plain'"
        if not call.interaction.has_backends:
            return f"interaction {call.interaction.name!r} has no backend"
        if call.options.dropout_p > 0:
            return "weights are dropped"
        backend = resolve_backend(call.options.backend)
        if backend is not None and backend.stores_logits:
            return f"backend {backend.name!r} stores its logits"
        return "there is no token" if tokens.shape[0] == 0 else None

    def run(self, call: Call) -> Tensor:
        """Tokens stay in their order; every chunk is gathered and scattered."""
        how, part = call.projections, call.draw().first
        assert isinstance(how, LinearProjections)
        x, (num_heads, head_size) = call.first, how.sizes[0]
        problem = Problem.of_sizes(x, head_size, head_size, call.options.scale, need_lse=True)
        chunk = batches_of_a_chunk(part.num_slots, x.shape[1], x.dtype)
        attention = _Attention(part, num_heads, pick_backend(call.options.backend, problem), problem, chunk)
        tensors = x, how.in_weight, how.in_bias, how.out_weight, how.out_bias
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
            return _forward(*tensors, attention, None)  # `apply` takes as long as a small call
        result: Any = _Projected.apply(*tensors, attention)
        return result[0]
