"""The op: check, partition, interact, scatter. And exact attention, to compare with."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from randbatch._autograd import refuse_transforms
from randbatch._checks import (
    check_batch_vector,
    check_choice,
    check_chunk_batches,
    check_integer,
    check_probability,
    check_qkv,
)
from randbatch._numerics import as_autocast, check_tensor, has_no_numbers
from randbatch._shapes import Float, Int
from randbatch.estimators import pick_estimator
from randbatch.estimators.in_pieces import Pipeline, estimate_in_pieces
from randbatch.interactions import INTERACTIONS, Options
from randbatch.kernels import Problem, reference, sdpa
from randbatch.orthogonal import Rounds, draw_rounds
from randbatch.partition import Partition, draw_seed, random_partition
from randbatch.streaming import ChunkBatches
from randbatch.tolerance import choose_rounds

__all__ = ["estimate", "full_attention", "random_batch_attention"]

_MANY_HEADS = 64  # more than the models of the field have
_CHUNK_LOGITS = 2**24  # full attention holds this many logits at a time: 64 MiB in fp32


def random_batch_attention(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    *,
    batch_size: int | None = None,
    batch: Int[Tensor, " n"] | None = None,
    estimator: str = "plain",
    rounds: int = 1,
    tolerance: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    partition: Partition | None = None,
    backend: str = "auto",
    interaction: str = "softmax",
    chunk_batches: int | Literal["auto"] | None = None,
) -> Float[Tensor, "n h dv"]:
    """Attention inside random batches of p tokens: `y_i = Σ_{j∈C(i)} softmax_j(scale · q_i·k_j) v_j`.

    C(i) is the random batch of token i. O(N p) time and O(N) memory; with `batch_size >= N` it is full attention.

    Args:
        query: `[N, H, D]`, fp64, fp32, bf16 or fp16.
        key: `[N, H, D]`.
        value: `[N, H, Dv]`.
        batch_size: p >= 2, tokens in a random batch. It may be left out when `partition` is given.
        batch: integers `[N]`, the graph of each token, in any order; graphs are never mixed. Default: one graph.
        estimator: how in-batch outputs estimate full attention. `"plain"` is the paper's; `"debiased"` no longer
            over-counts a token's own weight; `"corrected"` adds mean fields, and is the most accurate.
        rounds: R >= 1. More than one are orthogonal: no pair meets twice, and a token meets R (p − 1) others, until all
            have met and the output is full attention. Merged by log-sum-exp; time is proportional to R, memory is not.
        tolerance: a relative error > 0: as many rounds as `choose_rounds` finds it to take, or exact attention where
            that costs less; `rounds` must be left at 1. Call that yourself to know how many they are. Default: none,
            `rounds` says it.
        scale: factor of the logits. Default: 1/√D.
        dropout_p: probability that an attention weight is dropped; the others grow by 1/(1 − dropout_p). Default: 0,
            as in `scaled_dot_product_attention`; the op does not know train from eval, a module does.
        seed: an int fixes the partition: what a graph of `batch` gets then depends on its size and the seed alone, and
            two graphs of one size are split alike. Default: drawn from torch's default CPU generator, so that
            `torch.manual_seed` reproduces it, and graphs are split independently.
        partition: use this partition instead of drawing one; then `rounds` must be 1, there is no `tolerance`, and
            `batch`, `seed` and `batch_size` say nothing.
        backend: `"cpu"` (one fused C++ function, fp32, compiled at its first call), `"sdpa"`, `"reference"`, or
            `"auto"`: the first of these that can take the problem. `"triton"` (one fused kernel, CUDA only) is to be
            asked for by name until it was verified on a GPU.
        interaction: what happens inside a batch, `"softmax"` or `"linear"`.
        chunk_batches: batches at a time, computed again in backward: memory is that of the arguments, the output, their
            gradients and one piece, whatever p. `"auto"`: as many as fit into free memory, and no more than are of
            use. Default: None, all at once and kept for backward, which takes a fifth to a third less time.

    Returns:
        `[N, H, Dv]` in the dtype of `value`.

    Raises:
        TypeError: a tensor is not floating point, dtypes differ, an int argument is not an int.
        ValueError: shapes or devices differ, an unknown name, a backend that cannot, `batch_size` < 2; `tolerance`
            beside `rounds`, `partition`, dropout or another interaction than softmax; `chunk_batches` < 1, or with
            the estimator `"corrected"` or several rounds of linear attention, which have no pieces.

    Source: Liu, Ma, Jin, Wang, "Random Batch Attention", arXiv 2511.06044.

    Example:
        >>> q, k, v = torch.randn(3, 1000, 4, 16).unbind()
        >>> random_batch_attention(q, k, v, batch_size=128, seed=0).shape
        torch.Size([1000, 4, 16])
        >>> exact = full_attention(q, k, v)
        >>> torch.allclose(random_batch_attention(q, k, v, batch_size=1000), exact, atol=1e-5)
        True
    """
    check_tensor("query", query)
    query, key, value = as_autocast(query, key, value)
    check_qkv(query, key, value)
    _warn_of_axes(query)
    check_batch_vector(batch, query.shape[0], query.device)
    check_probability("dropout_p", dropout_p)
    check_choice("interaction", interaction, INTERACTIONS)
    check_chunk_batches(chunk_batches)
    if tolerance is not None:
        refuse_transforms("tolerance", "give rounds instead")
        _check_tolerance_alone(rounds, partition, dropout_p, interaction)
    if torch.compiler.is_compiling() and not _is_traceable(
        batch, estimator, rounds, tolerance, interaction, chunk_batches
    ):
        raise NotImplementedError(
            "torch.compile cannot trace the op with graphs, several rounds, a tolerance, chunks, the estimator "
            "'corrected' or linear attention: use rb.nn.RandomBatchAttention, or compile without fullgraph=True"
        )
    if has_no_numbers(query):
        return value + 0.0 * (query.sum() + key.sum())  # of the right shape, dtype and graph
    if partition is not None:
        parts: Rounds = _check_partition(partition, query, rounds)
    elif batch_size is None:
        raise TypeError("batch_size is missing: give batch_size (an int >= 2) or a partition")
    else:
        batch_size = check_integer("batch_size", batch_size, 2)
        if tolerance is not None:
            seed = draw_seed() if seed is None else seed
            choice = choose_rounds(
                query, key, value, batch_size, tolerance, batch=batch, estimator=estimator, scale=scale, seed=seed
            )
            if choice.exact:
                return full_attention(query, key, value, batch=batch, scale=scale)
            rounds = choice.rounds
        parts = draw_rounds(query.shape[0], batch_size, rounds, batch=batch, seed=seed, device=query.device)
    options = Options(scale, dropout_p, backend)
    return estimate(query, key, value, parts, estimator, interaction, options, chunk_batches)


def estimate(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    rounds: Rounds,
    estimator: str,
    interaction: str,
    options: Options,
    chunk_batches: ChunkBatches = None,
) -> Float[Tensor, "n h dv"]:
    """The op once its partitions are known."""
    if chunk_batches is not None:
        numbers = 2 * query.shape[1] * (query.shape[2] + value.shape[2])
        pipeline = Pipeline((query, key, value), numbers)
        return estimate_in_pieces(
            pipeline, rounds, estimator, interaction, options, chunk_batches, num_heads=query.shape[1]
        )
    return pick_estimator(estimator)(query, key, value, rounds, interaction, options)


def _is_traceable(
    batch: Tensor | None,
    estimator: str,
    rounds: int,
    tolerance: float | None,
    interaction: str,
    chunk_batches: ChunkBatches,
) -> bool:
    one_set = batch is None and tolerance is None and chunk_batches is None and rounds == 1
    return one_set and interaction == "softmax" and estimator != "corrected"


def _warn_of_axes(query: Tensor) -> None:
    """Warn where tokens and heads look exchanged."""
    num_tokens, num_heads, _ = query.shape
    if torch.compiler.is_compiling():
        return
    if num_heads >= _MANY_HEADS and num_heads > num_tokens:
        warnings.warn(
            f"query {list(query.shape)} is taken as {num_tokens} tokens of {num_heads} heads, [N, H, D]; if it is "
            "[H, N, D], transpose it",
            stacklevel=3,
        )


def _check_tolerance_alone(rounds: int, partition: Partition | None, dropout_p: float, interaction: str) -> None:
    if rounds != 1:
        raise ValueError(f"rounds must be left at 1 when tolerance is given, which chooses them; got {rounds}")
    if partition is not None:
        raise ValueError("partition must be left out when tolerance is given, which draws as many as it takes")
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0 when tolerance is given, got {dropout_p}: dropped weights are an error")
    if interaction != "softmax":
        raise ValueError(f"tolerance is for interaction='softmax', got {interaction!r}")


def _check_partition(partition: Partition, query: Tensor, rounds: int) -> Partition:
    if rounds != 1:
        raise ValueError(f"rounds must be 1 when a partition is given, got {rounds}")
    if partition.num_tokens != query.shape[0]:
        raise ValueError(f"partition is of {partition.num_tokens} tokens, but query has {query.shape[0]}")
    if partition.order.device != query.device:
        raise ValueError(f"partition is on {partition.order.device}, but query is on {query.device}")
    return partition


def full_attention(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    *,
    batch: Int[Tensor, " n"] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, "n h dv"]:
    """Exact attention, `y_i = Σ_j softmax_j(scale · q_i·k_j) v_j`, in O(N) memory and O(N²) time.

    Where torch has a kernel that does not store the logits, that is used. Elsewhere, or if `chunk_size` is given,
    queries are taken in chunks whose logits are computed again in the backward pass.

    Args:
        query: `[N, H, D]`, fp64, fp32, bf16 or fp16.
        key: `[N, H, D]`.
        value: `[N, H, Dv]`.
        batch: integers `[N]`, the graph of each token; attention stays inside each graph. Default: one graph.
        scale: factor of the logits. Default: 1/√D.
        chunk_size: queries (of each graph) at a time. Default: as many as keep about 16 million logits.

    Returns:
        `[N, H, Dv]` in the dtype of `value`.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ.
        ValueError: shapes or devices differ, or `chunk_size` < 1.

    Example:
        >>> q, k, v = torch.randn(3, 6, 1, 8).unbind()
        >>> graphs = torch.tensor([0, 0, 1, 1, 1, 0])
        >>> torch.allclose(full_attention(q, k, v, batch=graphs)[2:5], full_attention(q[2:5], k[2:5], v[2:5]))
        True
    """
    check_tensor("query", query)
    query, key, value = as_autocast(query, key, value)
    check_qkv(query, key, value)
    num_tokens = query.shape[0]
    check_batch_vector(batch, num_tokens, query.device)
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, 1)
    if num_tokens == 0:
        return value.clone()
    if has_no_numbers(query):
        return value + 0.0 * (query.sum() + key.sum())
    problem = Problem.of(query, value, scale)
    if problem.transformed:
        if chunk_size is not None:
            refuse_transforms("chunk_size", "leave it out")
        chunk_size = num_tokens
    whole = random_partition(num_tokens, max(num_tokens, 2), batch=batch, device=query.device)  # a batch per graph
    blocks = zip(*(whole.split(whole.pack(tensor)) for tensor in (query, key, value)), strict=True)
    return whole.unpack(whole.join([_attend_in_chunks(q, k, v, problem, chunk_size) for q, k, v in blocks]))


def _attend_in_chunks(query: Tensor, key: Tensor, value: Tensor, problem: Problem, chunk_size: int | None) -> Tensor:
    """Softmax attention inside each of `[M, P, H, D]`, without holding more than a chunk's logits."""
    # of all keys by chunks of queries, which is not attention inside a partition
    attend = reference.attend if problem.transformed else sdpa.attend
    num_batches, width, num_heads, _ = query.shape
    if chunk_size is None:
        if sdpa.is_linear_memory(problem):
            return attend(query, key, value, problem, None)[0]
        chunk_size = max(1, _CHUNK_LOGITS // (num_batches * width * num_heads))
    if chunk_size >= width:
        return attend(query, key, value, problem, None)[0]

    def attend_chunk(chunk: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(chunk, key, value, problem, None)[0]

    chunks = [checkpoint(attend_chunk, chunk, key, value, use_reentrant=False) for chunk in query.split(chunk_size, 1)]
    return torch.cat(chunks, dim=1)
