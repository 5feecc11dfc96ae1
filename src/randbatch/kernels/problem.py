"""What a backend is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch._autograd import is_transformed
from randbatch._numerics import logit_scale


@dataclass(frozen=True)
class Problem:
    """Everything but the numbers: a backend decides by this whether it can.

    Attributes:
        device: of the tensors.
        dtype: of the tensors.
        head_size: D of query and key.
        value_size: Dv.
        scale: factor of the logits.
        dropout_p: probability that a weight is dropped.
        need_lse: whether the log-sum-exp of the logits is wanted.
        exclude_self: whether a token does not attend to itself (query i and key i of a batch are one token).
        transformed: whether a transform of `torch.func` or forward-mode differentiation is at work, which only plain
            torch knows how to pass through.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    value_size: int
    scale: float
    dropout_p: float = 0.0
    need_lse: bool = False
    exclude_self: bool = False
    transformed: bool = False

    @classmethod
    def of(
        cls,
        query: Tensor,
        value: Tensor,
        scale: float | None,
        dropout_p: float = 0.0,
        *,
        need_lse: bool = False,
        exclude_self: bool = False,
    ) -> Problem:
        """The problem posed by query `[…, D]` and value `[…, Dv]`; the default scale is 1/√D."""
        size, value_size = int(query.shape[-1]), int(value.shape[-1])  # no symbols: kernels are made for them
        return cls.of_sizes(query, size, value_size, scale, dropout_p, need_lse=need_lse, exclude_self=exclude_self)

    @classmethod
    def of_sizes(
        cls,
        like: Tensor,
        head_size: int,
        value_size: int,
        scale: float | None,
        dropout_p: float = 0.0,
        *,
        need_lse: bool = False,
        exclude_self: bool = False,
    ) -> Problem:
        """The same for projections of these sizes, of the device and the dtype of `like`."""
        factor = logit_scale(scale, head_size)
        return cls(
            like.device, like.dtype, head_size, value_size, factor, dropout_p, need_lse, exclude_self, is_transformed()
        )

    def why_not_transformed(self) -> str | None:
        """Why a backend that is not plain torch cannot, if so."""
        if not self.transformed:
            return None
        return "inside torch.func transforms and forward-mode differentiation only backend 'reference' is right"

    def why_not_of_size(self, largest: int) -> str | None:
        """Why a backend for heads of at most `largest` numbers cannot, if so."""
        for name, size in (("query and key", self.head_size), ("value", self.value_size)):
            if not 1 <= size <= largest:
                return f"it takes heads of 1 to {largest} numbers, got {size} in {name}"
        return None
