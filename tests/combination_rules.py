"""Which combinations are refused: what the documentation says does not go together.

Delete a rule, or narrow it, when what it refuses is offered; a combination that is refused without a rule is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from combination_cases import TRANSFORMS, Case
from combination_entries import Entry

import randbatch as rb


@dataclass(frozen=True)
class Rule:
    """What is refused, by what the documentation says; `argument` is in the message."""

    reason: str
    argument: str
    holds: Callable[[Case, Entry], bool]


def _is_linear(case: Case) -> bool:
    return case.interaction == "linear" and case.entry != "model"  # whose other options are of "rba" alone


def _in_chunks(case: Case, entry: Entry) -> bool:
    """Whether batches are computed some at a time; in `full_attention` there are none."""
    is_full = entry.is_settled or (case.exact and case.interaction == "softmax" and case.entry != "wrapper")
    of_rba = case.entry != "model" or case.interaction == "softmax"
    return case.chunk_batches is not None and of_rba and not is_full


def is_split(case: Case, entry: Entry) -> bool:
    """Whether some graph has more than one batch."""
    if case.partition:
        return entry.partition is not None and not entry.partition.is_whole
    return case.p < entry.largest and not case.exact


def is_fitted(case: Case, entry: Entry) -> bool:
    """Whether mean fields correct what a batch knows; where a batch is the whole set there is nothing to correct."""
    of_rba = case.entry != "model" or case.interaction == "softmax"
    return case.estimator == "corrected" and of_rba and is_split(case, entry) and not entry.is_settled


def _attends(case: Case, entry: Entry) -> bool:
    """Whether there is softmax in batches, for which a backend is asked; there is none in `full_attention`."""
    return case.interaction == "softmax" and case.entry != "wrapper" and not case.exact and not entry.is_settled


def _fused(case: Case) -> bool:
    """Whether attention runs in one fused function of C++ or triton."""
    auto = case.backend == "auto" and case.computed == torch.float32 and has_compiler()
    return case.backend in ("cpu", "triton") or auto


@cache
def has_compiler() -> bool:
    """Whether this machine can build the backend `cpu`."""
    try:
        rb.random_batch_attention(*torch.zeros(3, 4, 1, 4), batch_size=2, backend="cpu")
    except ValueError:
        return False
    return True


RULES = (
    Rule(
        "the mean field is known for softmax", "estimator", lambda c, e: _is_linear(c) and c.estimator == "corrected"
    ),
    Rule("linear attention has no logits", "scale", lambda c, e: _is_linear(c) and c.scale is not None),
    Rule("linear attention has no attention weights", "dropout", lambda c, e: c.interaction == "linear" and c.drops),
    Rule("linear attention has one implementation", "backend", lambda c, e: _is_linear(c) and c.backend != "auto"),
    Rule(
        "corrected has no chunks", "chunk_batches",
        lambda c, e: c.estimator == "corrected" and c.chunk_batches is not None
        and (c.entry != "model" or c.interaction == "softmax"),
    ),
    Rule(
        "what any function needs of memory is not known", "chunk_batches",
        lambda c, e: c.entry == "wrapper" and c.chunk_batches == "auto",
    ),
    Rule(
        "tolerance chooses the rounds", "rounds",
        lambda c, e: c.entry == "op" and c.tolerance is not None and c.rounds > 1,
    ),
    Rule("tolerance draws its partitions", "partition", lambda c, e: c.tolerance is not None and c.partition),
    Rule("dropped weights are an error", "dropout", lambda c, e: c.tolerance is not None and c.drops),
    Rule(
        "the error of softmax alone is known", "tolerance",
        lambda c, e: c.tolerance is not None and not c.training and (_is_linear(c) or c.entry == "wrapper"),
    ),
    Rule(
        "tolerance looks at numbers", "tolerance",
        lambda c, e: c.tolerance is not None and not c.training and c.mode in TRANSFORMS,
    ),
    Rule("a partition is one round", "rounds", lambda c, e: c.partition and c.rounds > 1),
    Rule(
        "the fused C++ is for float32", "backend",
        lambda c, e: _attends(c, e) and c.backend == "cpu" and (c.computed != torch.float32 or not has_compiler()),
    ),
    Rule(
        "triton is not for float64", "backend",
        lambda c, e: _attends(c, e) and c.backend == "triton" and c.dtype == "fp64",
    ),
    Rule(
        "torch gives no log-sum-exp with dropout or Dv other than D, and rounds need it", "backend",
        lambda c, e: _attends(c, e) and c.backend == "sdpa" and c.rounds_of_call > 1 and (c.drops or c.d != c.dv)
        and not (c.estimator == "corrected" and not is_split(c, e)),
    ),
    Rule(
        "only plain torch passes through transforms", "backend",
        lambda c, e: _attends(c, e) and c.mode in TRANSFORMS and c.backend in ("cpu", "triton", "sdpa"),
    ),
    Rule(
        "what is computed again in backward has first derivatives only", "chunk_batches",
        lambda c, e: _in_chunks(c, e) and c.mode in ("second", *TRANSFORMS),
    ),
    Rule(
        "weights that are fitted have first derivatives only", "estimator",
        lambda c, e: is_fitted(c, e) and c.mode in ("second", *TRANSFORMS),
    ),
    Rule(
        "a fused function that drops has first derivatives only", "dropout",
        lambda c, e: c.mode == "second" and c.drops and _attends(c, e) and _fused(c),
    ),
    Rule(
        "torch.compile cannot choose rounds by numbers", "tolerance",
        lambda c, e: c.mode == "compile" and c.tolerance is not None and c.entry == "op",
    ),
    Rule(
        "the wrapper under torch.compile is one round, all at once", "chunk_batches",
        lambda c, e: c.mode == "compile" and c.entry == "wrapper"
        and (c.chunk_batches is not None or (c.training and c.rounds > 1)),
    ),
    Rule(
        "and one graph", "batch", lambda c, e: c.mode == "compile" and c.entry == "wrapper" and (c.graphs or c.padded),
    ),
)  # fmt: skip
