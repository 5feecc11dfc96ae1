"""Padded sets `[B, N, C]` as flat tokens `[T, C]` with a `batch` vector, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch._numerics import has_no_elements
from randbatch._shapes import Bool, Int, Shaped
from randbatch.partition import UNTRACEABLE

__all__ = ["PaddedSets", "kept_where_zero"]


@dataclass(frozen=True, eq=False)
class PaddedSets:
    """Which rows of B padded sets of N are tokens, and which set each token belongs to.

    Args:
        shape: (B, N).
        rows: int64 `[T]`, the rows of `[B · N]` that hold a token; None if all do.
        batch: int64 `[T]`, the set of each token; None if there is one set.
    """

    shape: tuple[int, int]
    rows: Int[Tensor, " t"] | None
    batch: Int[Tensor, " t"] | None

    @classmethod
    def of(cls, x: Shaped[Tensor, "b n ..."], keep: Bool[Tensor, "b n"] | None, name: str) -> PaddedSets:
        """The sets in `x`, of which `keep` marks the real tokens. `name` is what the caller calls the mask."""
        num_sets, width = x.shape[:2]
        if keep is not None and keep.shape != (num_sets, width):
            raise ValueError(f"{name} must have shape {[num_sets, width]}, got {list(keep.shape)}")
        if (torch.compiler.is_compiling() or has_no_elements(x)) and (keep is not None or num_sets > 1):
            raise NotImplementedError(UNTRACEABLE)
        if keep is None or bool(keep.all()):
            rows = None
            batch = torch.arange(num_sets, device=x.device).repeat_interleave(width)
        else:
            rows = keep.flatten().nonzero().squeeze(1)
            batch = rows.div(width, rounding_mode="floor")
        return cls((num_sets, width), rows, batch if num_sets > 1 else None)

    def flatten(self, x: Shaped[Tensor, "b n ..."]) -> Shaped[Tensor, "t ..."]:
        """`[B, N, …]` to the tokens `[T, …]`."""
        flat = x.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def restore(self, tokens: Shaped[Tensor, "t ..."]) -> Shaped[Tensor, "b n ..."]:
        """Tokens `[T, …]` to `[B, N, …]`, zero where there is no token."""
        if self.rows is not None:
            num_rows = self.shape[0] * self.shape[1]
            tokens = tokens.new_zeros(num_rows, *tokens.shape[1:]).index_copy(0, self.rows, tokens)
        return tokens.unflatten(0, self.shape)


def kept_where_zero(mask: Tensor, name: str) -> Tensor:
    """True where an additive mask is 0, False where it is −inf or the dtype's lowest number; no other is taken."""
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating point, got {mask.dtype}")
    ignored = mask <= torch.finfo(mask.dtype).min
    if not (torch.compiler.is_compiling() or has_no_elements(mask)) and bool((mask[~ignored] != 0).any()):
        raise ValueError(f"{name} must be 0 or -inf where it is floating point; a finite bias is not taken")
    return ~ignored
