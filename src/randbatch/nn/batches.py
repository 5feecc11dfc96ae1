"""Attention and functions of sets inside random batches, for modules that project by themselves.

Shape letters: N tokens, B padded sets, H heads, D head size of query and key, Dv of value, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from randbatch._checks import check_batch_vector, check_qkv
from randbatch._errors import InvalidType, InvalidValue
from randbatch._numerics import as_autocast, check_tensor
from randbatch._shapes import Bool, Int, Shaped
from randbatch.estimators import ESTIMATORS
from randbatch.execution import run
from randbatch.interactions import Function, Options
from randbatch.interactions.rounds import Projections
from randbatch.nn.config import RandomBatchConfig

__all__ = ["apply_in_batches", "attend_in_batches"]


def attend_in_batches(
    config: RandomBatchConfig,
    training: bool,
    query: Shaped[Tensor, "... h d"],
    key: Shaped[Tensor, "... h d"],
    value: Shaped[Tensor, "... h dv"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    batch: Int[Tensor, " n"] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Shaped[Tensor, "... h dv"]:
    """Attention of projected tokens, as `config` says; `dropout_p` counts in training only.

    Query, key and value are flat tokens `[N, H, D]` with `batch`, or padded sets `[B, N, H, D]` with `mask`
    (True = token); rows without a token come back as zeros.
    """
    check_tensor("query", query)
    query, key, value = as_autocast(query, key, value)
    padded = _check_form("query", query, 3, mask, batch)
    check_qkv(*(x.flatten(0, 1) if padded else x for x in (query, key, value)))
    projections = Projections.of((query, key, value))
    return run(
        config.call(
            projections, training, scale=scale, dropout_p=dropout_p, padded=padded, batch=batch, mask=mask
        )
    )  # fmt: skip


def apply_in_batches(
    config: RandomBatchConfig,
    training: bool,
    function: Callable[[Tensor], Tensor],
    x: Shaped[Tensor, "n c"] | Shaped[Tensor, "b n c"],
    mask: Bool[Tensor, "b n"] | None = None,
    batch: Int[Tensor, " n"] | None = None,
    owner: nn.Module | None = None,
) -> Tensor:
    """A function over sets, `[M, P, C] -> [M, P, C']`, inside random batches; several rounds are averaged.

    It gets whole batches of equal size, never padding. `x` is flat tokens `[N, C]` with `batch`, or padded sets
    `[B, N, C]` with `mask` (True = token); rows without a token come back as zeros. `owner` is the module that the
    function belongs to.
    """
    check_tensor("x", x)
    padded = _check_form("x", x, 2, mask, batch)
    if config.chunk_batches == "auto":
        raise InvalidValue("chunk_batches must be an int or None here: what any function needs of memory is not known")
    call = config.call(Projections((x,), owner=owner), training, padded=padded, batch=batch, mask=mask)
    # estimator and backend of a model's config are for its softmax attentions: of a function nothing is known
    return run(
        call.but(interaction=Function(function), estimator=ESTIMATORS["plain"], options=Options(), observer=None)
    )  # fmt: skip


def _check_form(name: str, x: Tensor, flat: int, mask: Tensor | None, batch: Tensor | None) -> bool:
    """Whether the tokens stand in padded sets; refuse what belongs to the other form."""
    letters = "C" if flat == 2 else "H, D"
    if x.dim() == flat:
        if mask is not None:
            raise InvalidValue(f"mask is for padded sets [B, N, {letters}]; flat tokens [N, {letters}] take batch")
        check_batch_vector(batch, x.shape[0], x.device)
        return False
    if x.dim() != flat + 1:
        raise InvalidValue(f"{name} must be [N, {letters}] or [B, N, {letters}], got {list(x.shape)}")
    if batch is not None:
        raise InvalidValue(f"batch is for flat tokens [N, {letters}]; padded sets [B, N, {letters}] take mask")
    if mask is not None and mask.dtype != torch.bool:
        raise InvalidType(f"mask must be bool, got {mask.dtype}")
    return True
