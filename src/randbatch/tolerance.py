"""As many rounds as it takes for a stated error, known from a sample of tokens whose attention is computed exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from randbatch._checks import check_batch_vector, check_choice, check_integer, check_positive, check_qkv
from randbatch._shapes import Float, Int
from randbatch.estimators import ESTIMATORS
from randbatch.estimators.sampled import SampledEstimates
from randbatch.orthogonal import all_rounds, count_rounds, partitions_of
from randbatch.partition import fold_seed, random_partition

__all__ = ["RoundsChoice", "choose_rounds", "relative_error_bound", "sample_tokens"]

_SAMPLED = 512
_SAMPLE = 2**40  # no layer or round has this number: the sample knows nothing of the partitions
_STANDARD_ERRORS = 3.0  # few tokens may carry most of the error, and the first of many looks that suffices is taken


@dataclass(frozen=True)
class RoundsChoice:
    """How many rounds, and how far from full attention they are.

    Attributes:
        rounds: R, to be given to `random_batch_attention` with the same `seed`.
        error: what the relative error `‖ŷ − y‖ / ‖y‖` over all tokens and heads is stated to stay below: an upper
            confidence bound from the sampled tokens. 0 where all pairs have met.
    """

    rounds: int
    error: float


@torch.no_grad()
def choose_rounds(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    batch_size: int,
    tolerance: float,
    *,
    batch: Int[Tensor, " n"] | None = None,
    estimator: str = "plain",
    scale: float | None = None,
    seed: int = 0,
    max_rounds: int | None = None,
) -> RoundsChoice:
    """The fewest rounds R whose relative error `‖ŷ − y‖ / ‖y‖` is, with confidence, at most `tolerance`.

    The attention y of S = 512 sampled tokens is computed exactly, and rounds are added at those tokens alone until
    `mean ‖ŷ_i − y_i‖² / mean ‖y_i‖²` plus three of its standard errors is at most `tolerance²`: O(S N D) and O(S p D) a
    round, and O(N log N) to draw it. The error of rounding in low precision is not in it. Where a few tokens in
    thousands carry the whole error, a sample may miss them. Calibration: docs, "How far off".

    Args:
        query: `[N, H, D]`.
        key: `[N, H, D]`.
        value: `[N, H, Dv]`.
        batch_size: p >= 2.
        tolerance: relative error > 0.
        batch: integers `[N]`, the graph of each token. Default: one graph.
        estimator: `"plain"`, `"debiased"` or `"corrected"`.
        scale: factor of the logits. Default: 1/√D.
        seed: of the rounds; the sample is drawn from it too. Default: 0.
        max_rounds: stop here and state the error that is left. Default: go on until all pairs have met, which is
            full attention.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes or devices differ, an unknown estimator, a number out of range.

    Example:
        >>> q, k, v = torch.randn(3, 1000, 4, 16, generator=torch.Generator().manual_seed(0)).unbind()
        >>> choice = choose_rounds(q, k, v, batch_size=50, tolerance=0.3, estimator="debiased")
        >>> 1 < choice.rounds < 20, choice.error <= 0.3
        (True, True)
    """
    check_qkv(query, key, value)
    num_tokens = query.shape[0]
    check_batch_vector(batch, num_tokens, query.device)
    check_integer("batch_size", batch_size, 2)
    check_positive("tolerance", tolerance)
    check_choice("estimator", estimator, ESTIMATORS)
    check_integer("seed", seed)
    if max_rounds is not None:
        check_integer("max_rounds", max_rounds, 1)
    one = random_partition(num_tokens, batch_size, batch=batch, seed=seed, device=query.device)
    if one.is_whole:
        return RoundsChoice(1, 0.0)
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = sample_tokens(query, _SAMPLED, seed)
    look = SampledEstimates(query, key, value, tokens, factor, [estimator])
    exact = look.exact(one)
    if not bool(exact.isfinite().all()):
        return RoundsChoice(1, math.nan)  # no number of rounds would mend it
    look.add(one)
    error = relative_error_bound(look.outputs()[estimator], exact, num_tokens)
    rounds, made, every = 1, 0, count_rounds(num_tokens, batch_size, batch)
    look = SampledEstimates(query, key, value, tokens, factor, [estimator])
    parts = all_rounds(num_tokens, batch_size, batch, seed, query.device)
    while error > tolerance and rounds != max_rounds:
        rounds += 1
        wanted = partitions_of(rounds, num_tokens, batch_size, batch)
        for part in islice(parts, wanted - made):
            look.add(part)
            made += 1
        if made == every:
            return RoundsChoice(rounds, 0.0)
        error = relative_error_bound(look.outputs()[estimator], exact, num_tokens)
    return RoundsChoice(rounds, error)


def sample_tokens(query: Float[Tensor, "n h d"], number: int, seed: int) -> Int[Tensor, "h s"]:
    """Some tokens, uniform without repetition, the same for every head; all of them where there are no more."""
    num_tokens, heads, _ = query.shape
    order = random_partition(num_tokens, max(num_tokens, 2), seed=fold_seed(seed, _SAMPLE), device=query.device).order
    return order[:number].expand(heads, -1)


def relative_error_bound(out: Float[Tensor, "h s e"], exact: Float[Tensor, "h s e"], num_tokens: int) -> float:
    """Upper confidence bound of `‖ŷ − y‖ / ‖y‖` over all tokens, from a sample of them."""
    squared_error = (out - exact).double().square().sum(dim=(0, 2))
    squared = exact.double().square().sum(dim=(0, 2))
    size = squared.mean().clamp(min=torch.finfo(torch.float64).tiny)
    ratio = squared_error.mean() / size
    number = len(squared)
    if number < num_tokens:
        spread = (squared_error - ratio * squared).std() / size
        ratio = ratio + _STANDARD_ERRORS * spread * math.sqrt(1 / number - 1 / num_tokens)
    return math.sqrt(float(ratio))
