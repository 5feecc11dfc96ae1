"""As many rounds as it takes for a stated error, known from a sample of tokens whose attention is computed exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from randbatch._autograd import refuse_transforms
from randbatch._checks import check_batch_vector, check_integer, check_positive, check_qkv
from randbatch._errors import InvalidValue
from randbatch._numerics import as_autocast, logit_scale
from randbatch._seeds import fold_seed, random_keys
from randbatch._shapes import Bool, Float, Int
from randbatch.estimators import ESTIMATORS, Estimator
from randbatch.estimators.probe import Probe, SetsOf, log_attention_of, rows_of
from randbatch.partition import Partition, random_partition
from randbatch.partition.orthogonal import all_rounds, count_rounds, draw_rounds, partitions_of
from randbatch.partition.sets import largest_set, set_sizes

__all__ = ["RoundsChoice", "choose_rounds", "finite_tokens", "relative_error_bound", "sample_tokens"]

_SAMPLED = 512
_SAMPLE = 2**40  # no layer or round has this number: the sample knows nothing of the partitions
_STANDARD_ERRORS = 3.0  # few tokens may carry most of the error, and the first of many looks that suffices is taken
_WORTH = 0.5  # of all rounds: where more are needed, exact attention is cheaper
_SHORT = 0.8  # of what seems to be needed is tried
_ROUNDING = 2.0  # standard errors of rounding, whose errors are taken for independent


@dataclass(frozen=True)
class RoundsChoice:
    """How many rounds, and how far from full attention they are.

    Attributes:
        rounds: R, to be given to `random_batch_attention` with the same `seed`.
        error: what the relative error `‖ŷ − y‖ / ‖y‖` over all tokens and heads is stated to stay below: an upper
            confidence bound from the sampled tokens, and what rounding adds to it in the dtype of the input.
        exact: whether all pairs meet in so many rounds; `full_attention` gives the same at less cost.
    """

    rounds: int
    error: float
    exact: bool = False


@torch.no_grad()
def choose_rounds(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    batch_size: int,
    tolerance: float,
    *,
    batch: Int[Tensor, " n"] | None = None,
    estimator: str | Estimator = "plain",
    scale: float | None = None,
    seed: int = 0,
    max_rounds: int | None = None,
) -> RoundsChoice:
    """The fewest rounds R whose relative error `‖ŷ − y‖ / ‖y‖` is, with confidence, at most `tolerance`.

    The attention y of S = 512 sampled tokens is computed exactly, and rounds are added at those tokens alone until the
    root of `mean ‖ŷ_i − y_i‖² / mean ‖y_i‖²` plus three of its standard errors, and the error of rounding, come to
    `tolerance`: O(S N D) and O(S p D) a round, and O(N log N) to draw it. Where more than half of all rounds would be
    needed, as the law of sampling without replacement says after some of them, exact attention is named instead. Where
    a few tokens in thousands carry the whole error, a sample may miss them. Calibration: docs, "How far off".

    Args:
        query: `[N, H, D]`.
        key: `[N, H, D]`.
        value: `[N, H, Dv]`.
        batch_size: p >= 2.
        tolerance: relative error > 0.
        batch: integers `[N]`, the graph of each token. Default: one graph.
        estimator: a name or an `Estimator` that can be probed at a few tokens.
        scale: factor of the logits. Default: 1/√D.
        seed: of the rounds; the sample is drawn from it too. Default: 0.
        max_rounds: stop here and state the error that is left. Default: go on, if need be to full attention.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes or devices differ, an unknown estimator, a number out of range, or an exact attention that is
            not finite.

    Example:
        >>> q, k, v = torch.randn(3, 1000, 4, 16, generator=torch.Generator().manual_seed(0)).unbind()
        >>> choice = choose_rounds(q, k, v + 1, batch_size=50, tolerance=0.2, estimator="debiased")
        >>> 1 < choice.rounds < 10, choice.error <= 0.2
        (True, True)
    """
    query, key, value = as_autocast(query, key, value)
    check_qkv(query, key, value)
    check_batch_vector(batch, query.shape[0], query.device)
    check_integer("batch_size", batch_size, 2)
    check_positive("tolerance", tolerance)
    estimator = ESTIMATORS.resolve(estimator)
    check_integer("seed", seed)
    if max_rounds is not None:
        check_integer("max_rounds", max_rounds, 1)
    refuse_transforms("tolerance", "give rounds instead")
    if query.shape[0] == 0:
        return RoundsChoice(1, 0.0, exact=True)
    factor = logit_scale(scale, query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):  # what is compared is not to be rounded
        return _choose(query, key, value, batch_size, tolerance, batch, estimator, factor, seed, max_rounds)


def _choose(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    batch_size: int,
    tolerance: float,
    batch: Int[Tensor, " n"] | None,
    estimator: Estimator,
    factor: float,
    seed: int,
    max_rounds: int | None,
) -> RoundsChoice:
    """`choose_rounds` once everything is checked."""
    num_tokens = query.shape[0]
    one = random_partition(num_tokens, batch_size, batch=batch, seed=seed, device=query.device)
    tokens = sample_tokens(query, _SAMPLED, seed)
    truth = _Truth.of(query, key, value, tokens, one, factor)
    if one.is_whole:
        return RoundsChoice(1, truth.rounding, exact=True)
    every = count_rounds(num_tokens, batch_size, batch)
    largest = largest_set(num_tokens, batch)
    in_full = RoundsChoice(-(-(largest - 1) // (batch_size - 1)), truth.rounding, exact=True)
    may_be_exact = max_rounds is None or max_rounds >= in_full.rounds
    if truth.rounding > tolerance and may_be_exact:
        return in_full
    look = _Look((query, key, value), tokens, factor, estimator, batch_size, batch, seed)
    rounds, error = 1, truth.error_of(look.after(1))
    while error > tolerance and rounds != max_rounds:
        needed = _rounds_needed(rounds, error, tolerance, in_full.rounds)
        if may_be_exact and needed > _WORTH * in_full.rounds:
            return in_full
        rounds = look.next_of(rounds, needed, max_rounds)
        if partitions_of(rounds, num_tokens, batch_size, batch) == every:
            return in_full
        error = truth.error_of(look.after(rounds))
    return RoundsChoice(rounds, error)


class _Look:
    """What an estimator gives at the sampled tokens after R rounds, for one R after the other."""

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        tokens: Int[Tensor, "h s"],
        scale: float,
        estimator: Estimator,
        batch_size: int,
        batch: Int[Tensor, " n"] | None,
        seed: int,
    ) -> None:
        self._tensors, self._tokens, self._scale, self._estimator = tensors, tokens, scale, estimator
        self._of = len(tensors[0]), batch_size, batch, seed, tensors[0].device
        # sets of unlike size have R rounds after unlike numbers of partitions: each R is then looked at afresh
        self._goes_on = batch is None or set_sizes(batch).unique().numel() == 1
        self._so_far, self._made = self._begin(), 0
        self._parts = all_rounds(*self._of)

    def _begin(self) -> Probe:
        return Probe(*self._tensors, self._tokens, self._scale, [self._estimator])

    def next_of(self, rounds: int, needed: float, max_rounds: int | None) -> int:
        """The R to be looked at next: the next, or short of what seems to be needed where each look is a new one."""
        following = rounds + 1 if self._goes_on else max(rounds + 1, int(_SHORT * needed))
        return following if max_rounds is None else min(following, max_rounds)

    def after(self, rounds: int) -> Float[Tensor, "h s e"]:
        """The output after R rounds, with the partitions that the op takes."""
        num_tokens, batch_size, batch, seed, device = self._of
        if not self._goes_on or rounds == 1:
            parts = draw_rounds(num_tokens, batch_size, rounds, batch=batch, seed=seed, device=device)
            look = self._begin()
            for part in parts:
                look.add(part)
            return self._estimator.at_tokens(look)
        wanted = partitions_of(rounds, num_tokens, batch_size, batch)
        for part in islice(self._parts, wanted - self._made):
            self._so_far.add(part)
        self._made = wanted
        return self._estimator.at_tokens(self._so_far)


def _rounds_needed(rounds: int, error: float, tolerance: float, all_rounds: int) -> float:
    """R at which the error comes to `tolerance` if it falls as `(1/R − 1/R_all)^½`, which it does for most input."""
    left = (tolerance / error) ** 2 * (1 / rounds - 1 / all_rounds)
    return 1 / (left + 1 / all_rounds)


def sample_tokens(query: Float[Tensor, "n h d"], number: int, seed: int) -> Int[Tensor, "h s"]:
    """Some tokens, uniform without repetition, the same for every head; all of them where there are no more.

    A function of N and the seed alone.
    """
    num_tokens, heads, _ = query.shape
    if num_tokens <= number:
        return torch.arange(num_tokens, device=query.device).expand(heads, -1)
    keys = random_keys(num_tokens, fold_seed(seed, _SAMPLE), query.device)
    return keys.argsort(stable=True)[:number].expand(heads, -1)


def finite_tokens(exact: Float[Tensor, "h s e"]) -> Bool[Tensor, " s"]:
    """The tokens whose exact attention is finite in every head: errors are stated for these.

    Raises:
        InvalidValue: there is none.
    """
    usable = exact.isfinite().all(dim=2).all(dim=0)
    if not bool(usable.any()):
        raise InvalidValue(
            f"query, key and value must be finite: the exact attention of all {len(usable)} tokens that were looked at "
            "is not"
        )
    return usable


@dataclass(frozen=True, eq=False)
class _Truth:
    """Exact attention `[H, S, E]` of the sampled tokens that have one, and what is known of its rounding.

    Attributes:
        exact: in at least fp32.
        usable: `[S]`, the tokens at which it is finite.
        rounding: bound of the relative error of an exact attention that is computed in the dtype of the input.
        num_tokens: N.
    """

    exact: Tensor
    usable: Tensor
    rounding: float
    num_tokens: int

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, tokens: Int[Tensor, "h s"], part: Partition, scale: float
    ) -> _Truth:
        exact, squared_weights, spread = _attend_and_spread(query, key, value, tokens, part, scale)
        usable = finite_tokens(exact) & squared_weights.isfinite().all(dim=0)
        wide = torch.finfo(exact.dtype).eps
        low = torch.finfo(query.dtype).eps
        # a logit errs by its D products, and by what exp makes of its size
        q = rows_of(query, tokens).to(exact.dtype).norm(dim=-1)
        k = key.to(exact.dtype).norm(dim=-1).nan_to_num(0.0, 0.0).amax(dim=0).unsqueeze(1)
        logit = wide * (query.shape[-1] ** 0.5 + 2) * abs(scale) * q * k  # [H, S]
        per_weight = low**2 * squared_weights + (2 * logit).clamp(max=1.0).square() * spread
        per_sum = (low**2 + wide**2 * _terms(len(key))) * exact.square().sum(dim=-1)
        squared = (per_weight + per_sum).double().sum(dim=0)[usable].mean()
        size = torch.maximum(exact.double().square().sum(dim=(0, 2))[usable].mean(), squared)
        rounding = _ROUNDING * math.sqrt(float(squared / size)) if float(size) > 0 else 0.0
        return cls(exact, usable, rounding, len(key))

    def error_of(self, out: Float[Tensor, "h s e"]) -> float:
        """Upper confidence bound of the relative error over all tokens, rounding included."""
        return self.rounding + relative_error_bound(out[:, self.usable], self.exact[:, self.usable], self.num_tokens)


def _terms(num_tokens: int) -> float:
    """How many roundings a sum over N tokens goes through, in blocks or in rounds."""
    return 4 + 2 * math.log2(num_tokens + 1)


def _attend_and_spread(
    query: Tensor, key: Tensor, value: Tensor, tokens: Int[Tensor, "h s"], part: Partition, scale: float
) -> tuple[Float[Tensor, "h s e"], Float[Tensor, "h s"], Float[Tensor, "h s"]]:
    """`y_i = Σ_j a_ij v_j`, `Σ_j a_ij² |v_j|²` and `Σ_j a_ij² |v_j − y_i|²` of the chosen tokens, in at least fp32."""
    values = value.to(torch.promote_types(value.dtype, torch.float32)).transpose(0, 1)  # [H, N, E]
    values = torch.cat([values, values.square().sum(dim=-1, keepdim=True)], dim=-1)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for log_weights in log_attention_of(query, key, tokens, SetsOf(part, tokens), scale):
        weights = log_weights.exp()
        y = (weights @ values)[..., :-1]
        squared = weights.square_()
        mixed = squared @ values
        size, of_y = mixed[..., -1], squared.sum(dim=-1) * y.square().sum(dim=-1)
        rows.append((y, size, (size - 2 * (mixed[..., :-1] * y).sum(dim=-1) + of_y).clamp(min=0)))
    exact, size, spread = (torch.cat(column, dim=1) for column in zip(*rows, strict=True))
    return exact, size, spread


def relative_error_bound(out: Float[Tensor, "h s e"], exact: Float[Tensor, "h s e"], num_tokens: int) -> float:
    """Upper confidence bound of `‖ŷ − y‖ / ‖y‖` over all tokens, from a sample of them.

    Infinite where ŷ is not finite, or where y is 0 and ŷ is not.
    """
    squared_error = (out.double() - exact.double()).square().sum(dim=(0, 2))
    squared = exact.double().square().sum(dim=(0, 2))
    if not bool(squared_error.any()):
        return 0.0
    size = squared.mean()
    ratio = squared_error.mean() / size
    number = len(squared)
    if 1 < number < num_tokens:
        spread = (squared_error - ratio * squared).std() / size
        ratio = ratio + _STANDARD_ERRORS * spread * math.sqrt(1 / number - 1 / num_tokens)
    return math.sqrt(float(ratio)) if bool(ratio.isfinite()) else math.inf
