"""The paper's estimator, and the same with a token's own weight no longer over-counted."""

from __future__ import annotations

from torch import Tensor

from randbatch._shapes import Float
from randbatch.estimators.met import attend_to_met, merge
from randbatch.interactions import Options, pick_interaction
from randbatch.interactions.linear import count_once
from randbatch.orthogonal import OrthogonalRounds, Rounds
from randbatch.partition import Partition

__all__ = ["debiased", "plain", "refuse_linear"]


def plain(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    rounds: Rounds,
    interaction: str,
    options: Options,
) -> Float[Tensor, "n h dv"]:
    """The interaction over the tokens that were met, in place of the whole set.

    `ŷ_i = Σ_{j∈C_i} w_ij v_j / Σ_{j∈C_i} w_ij`, C_i the batch of token i, or the union of its batches in all rounds.

    Source: Liu, Ma, Jin, Wang, arXiv 2511.06044.
    """
    if isinstance(rounds, Partition):
        return _in_batches(query, key, value, rounds, interaction, options)[0]
    if interaction == "softmax":
        return attend_to_met(query, key, value, rounds, options, 0.0)
    return _linear_rounds(query, key, value, rounds, options)


def debiased(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    rounds: Rounds,
    interaction: str,
    options: Options,
) -> Float[Tensor, "n h dv"]:
    """Plain, with the others weighted by κ = (n − 1) / |S_i|: numerator and denominator are unbiased.

    A token always meets itself, but only |S_i| of its n − 1 others. The ratio keeps a bias of O(1/p).
    """
    refuse_linear("debiased", interaction)
    if isinstance(rounds, Partition) and rounds.is_whole:
        return plain(query, key, value, rounds, interaction, options)  # full attention
    return attend_to_met(query, key, value, rounds, options, 1.0)


def refuse_linear(estimator: str, interaction: str) -> None:
    """The estimators beyond plain correct the softmax."""
    if interaction != "softmax":
        raise ValueError(f"estimator {estimator!r} is for interaction 'softmax', got {interaction!r}")


def _in_batches(
    query: Tensor, key: Tensor, value: Tensor, part: Partition, interaction: str, options: Options
) -> tuple[Tensor, Tensor | None]:
    """One round: output and, if asked, the logarithm of the denominator, in the order of the query."""
    if part.num_tokens == 0:
        return value.clone(), value.new_zeros(value.shape[:2])
    return pick_interaction(interaction)(query, key, value, part, options)


def _linear_rounds(query: Tensor, key: Tensor, value: Tensor, rounds: OrthogonalRounds, options: Options) -> Tensor:
    """Sums of all rounds; a token is in each of them, and counts once."""
    options = Options(options.scale, options.dropout_p, options.backend, need_log_norm=True)
    out = log_norm = None
    extra = -1
    for part in rounds:
        more, more_log_norm = _in_batches(query, key, value, part, "linear", options)
        assert more_log_norm is not None  # it was asked for
        if out is None or log_norm is None:
            out, log_norm = more, more_log_norm
        else:
            out, log_norm = merge(out, log_norm, more, more_log_norm)
        extra += 1
    if out is None or log_norm is None:
        raise ValueError("rounds must hold at least one partition")
    return count_once(query, key, value, out, log_norm, extra)
