"""What a backend is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Everything but the numbers: a backend decides by this whether it can."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    value_size: int
    scale: float
    dropout_p: float = 0.0
    need_lse: bool = False

    @classmethod
    def of(cls, query: Tensor, value: Tensor, scale: float, dropout_p: float = 0.0, need_lse: bool = False) -> Problem:
        """The problem posed by query `[…, D]` and value `[…, Dv]`."""
        return cls(query.device, query.dtype, query.shape[-1], value.shape[-1], scale, dropout_p, need_lse)
