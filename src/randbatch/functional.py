"""The ops: check, partition, interact, scatter. And exact attention, to compare with."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from randbatch._checks import (
    check_batch_vector,
    check_chunk_batches,
    check_integer,
    check_positive,
    check_probability,
    check_qkv,
)
from randbatch._errors import InvalidType, InvalidValue
from randbatch._numerics import as_autocast, check_tensor, has_no_elements
from randbatch._shapes import Float, Int
from randbatch.estimators import ESTIMATORS, Estimator
from randbatch.execution import Call, run
from randbatch.interactions import INTERACTIONS, Interaction, Options
from randbatch.interactions.rounds import Projections
from randbatch.kernels import Backend, Problem
from randbatch.kernels.exact import attend_exactly
from randbatch.partition import Partition, random_partition

__all__ = ["full_attention", "random_batch_attention", "random_batch_interaction"]

_MANY_HEADS = 64  # more than the models of the field have


def random_batch_attention(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    *,
    batch_size: int | None = None,
    batch: Int[Tensor, " n"] | None = None,
    estimator: str | Estimator = "plain",
    rounds: int = 1,
    tolerance: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    partition: Partition | None = None,
    backend: str | Backend = "auto",
    interaction: str | Interaction = "softmax",
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
        interaction: what a token does with those it meets: a name (`"softmax"`, `"linear"`, …) or an `Interaction`
            that takes query, key and value. `random_batch_interaction` takes any other.
        chunk_batches: batches at a time, computed again in backward: memory is that of the arguments, the output, their
            gradients and one piece, whatever p. `"auto"`: as many as fit into free memory, and no more than are of
            use. Default: None, all at once and kept for backward, which takes a fifth to a third less time.

    Returns:
        `[N, H, Dv]` in the dtype of `value`.

    Raises:
        TypeError: a tensor is not floating point, dtypes differ, an int argument is not an int.
        ValueError: shapes or devices differ, an unknown name, a backend that cannot, `batch_size` < 2; `tolerance`
            beside `rounds`, `partition`, dropout or another interaction than softmax; `chunk_batches` < 1, or with
            the estimator `"corrected"`; an estimator or an option that has no meaning for the interaction.

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
    found = INTERACTIONS.resolve(interaction)
    found.check_attention()
    call = _call(
        found, (query, key, value), batch_size, batch, estimator, rounds, tolerance,
        scale, dropout_p, seed, partition, backend, chunk_batches,
    )  # fmt: skip
    return run(call)


def random_batch_interaction(
    interaction: str | Interaction, *projections: Float[Tensor, "n h _"], **options: Any
) -> Float[Tensor, "n h _"]:
    """Any interaction inside random batches of p tokens, on its own projections.

    Args:
        interaction: a name or an `Interaction`.
        *projections: `[N, H, D]` each, as many and in the order that the attribute `projections` of the interaction
            says. Heads and head sizes may differ between them as far as the interaction takes it.
        **options: those of `random_batch_attention`, which is this function for query, key and value.

    Returns:
        `[N, H, D]` of the last projection.

    Raises:
        TypeError: a projection is missing, no tensor or not floating point, or there is no such option.
        ValueError: numbers of tokens or devices differ; whatever `random_batch_attention` refuses.

    Example:
        >>> q, k, v = torch.randn(3, 1000, 4, 16).unbind()
        >>> random_batch_interaction("linear", q, k, v, batch_size=128).shape
        torch.Size([1000, 4, 16])
    """
    found = INTERACTIONS.resolve(interaction)
    if len(projections) != len(found.projections):
        raise InvalidType(
            f"interaction {found.name!r} takes {len(found.projections)} projections ({', '.join(found.projections)}), "
            f"got {len(projections)}"
        )
    for name, tensor in zip(found.projections, projections, strict=True):
        check_tensor(name, tensor)
        if tensor.dim() < 2 or not tensor.is_floating_point():
            raise InvalidType(
                f"{name} must be a floating-point tensor [N, H, D], got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.shape[0] != projections[0].shape[0] or tensor.device != projections[0].device:
            raise InvalidValue(
                f"{name} has {tensor.shape[0]} tokens on {tensor.device}, but {found.projections[0]} has "
                f"{projections[0].shape[0]} on {projections[0].device}"
            )
    defaults = _defaults()
    unknown = [name for name in options if name not in defaults]
    if unknown:
        raise InvalidType(f"there is no option {unknown[0]!r}; the options are {', '.join(defaults)}")
    return run(_call(found, as_autocast(*projections), **{**defaults, **options}))


@cache
def _defaults() -> dict[str, Any]:
    """The options of the op, with their defaults."""
    parameters = inspect.signature(random_batch_attention).parameters.values()
    named = (each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY)
    return {each.name: each.default for each in named if each.name != "interaction"}


def _call(
    interaction: Interaction,
    projections: Sequence[Tensor],
    batch_size: int | None,
    batch: Tensor | None,
    estimator: str | Estimator,
    rounds: int,
    tolerance: float | None,
    scale: float | None,
    dropout_p: float,
    seed: int | None,
    partition: Partition | None,
    backend: str | Backend,
    chunk_batches: int | Literal["auto"] | None,
) -> Call:
    """The call of an op, checked."""
    tokens = projections[0]
    check_batch_vector(batch, tokens.shape[0], tokens.device)
    check_probability("dropout_p", dropout_p)
    check_chunk_batches(chunk_batches)
    rounds = check_integer("rounds", rounds, 1)
    if seed is not None:
        seed = check_integer("seed", seed)
    if tolerance is not None:
        check_positive("tolerance", tolerance)
        _check_tolerance_alone(rounds, partition, dropout_p)
    if partition is not None:
        _check_partition(partition, tokens, rounds)
        batch_size, batch = 2, None
    elif batch_size is None:
        raise InvalidType("batch_size is missing: give batch_size (an int >= 2) or a partition")
    return Call(
        Projections.of(projections),
        interaction,
        ESTIMATORS.resolve(estimator),
        Options(scale, dropout_p, backend),
        check_integer("batch_size", batch_size, 2),
        rounds,
        seed,
        chunk_batches,
        tolerance=tolerance,
        partition=partition,
        batch=batch,
    )


def _check_tolerance_alone(rounds: int, partition: Partition | None, dropout_p: float) -> None:
    if rounds != 1:
        raise InvalidValue(f"rounds must be left at 1 when tolerance is given, which chooses them; got {rounds}")
    if partition is not None:
        raise InvalidValue("partition must be left out when tolerance is given, which draws as many as it takes")
    if dropout_p != 0:
        raise InvalidValue(
            f"dropout_p must be 0 when tolerance is given, got {dropout_p}: dropped weights are an error"
        )


def _check_partition(partition: Partition, tokens: Tensor, rounds: int) -> None:
    if rounds != 1:
        raise InvalidValue(f"rounds must be 1 when a partition is given, got {rounds}")
    if partition.num_tokens != tokens.shape[0]:
        raise InvalidValue(f"partition is of {partition.num_tokens} tokens, but query has {tokens.shape[0]}")
    if partition.order.device != tokens.device and not has_no_elements(tokens):
        raise InvalidValue(f"partition is on {partition.order.device}, but query is on {tokens.device}")


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
    if has_no_elements(query):
        return value + 0.0 * (query.sum() + key.sum())  # of the right shape, dtype and graph
    whole = random_partition(num_tokens, max(num_tokens, 2), batch=batch, device=query.device)  # a batch per graph
    return attend_exactly(query, key, value, whole, Problem.of(query, value, scale), chunk_size)
