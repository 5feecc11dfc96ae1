"""Sums over the tokens that were met, and how two of them become one.

Shape letters: N tokens (or any leading dimensions), H heads, E size of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from randbatch._numerics import wide_dtype
from randbatch._shapes import Float, Int

__all__ = ["Partial", "log_kappa"]


class Partial(NamedTuple):
    """What some tokens contribute to the output of others.

    Attributes:
        out: `[N, H, E]`; the weighted sum of the values, divided by the sum of the weights where there is `log_norm`.
        log_norm: `[N, H]`, the logarithm of the sum of the weights; −∞ (and `out` 0) where nothing contributes. None
            for interactions that do not normalise.
    """

    out: Float[Tensor, "... h e"]
    log_norm: Float[Tensor, "... h"] | None

    def merge(self, other: Partial) -> Partial:
        """The contribution of both sets of tokens, which must be disjoint.

        Written out, since the second derivative of `logaddexp` is NaN where its arguments are far apart.
        """
        if self.log_norm is None or other.log_norm is None:
            return Partial(self.out + other.out, None)
        info = torch.finfo(self.log_norm.dtype)
        top = torch.maximum(self.log_norm, other.log_norm).detach().clamp(min=info.min)  # the result is free of it
        ours, theirs = (self.log_norm - top).exp(), (other.log_norm - top).exp()
        total = (ours + theirs).clamp(min=info.tiny)
        out = self.out * (ours / total).unsqueeze(-1) + other.out * (theirs / total).unsqueeze(-1)
        return Partial(out, top + total.log())

    def weigh(self, log_weight: Float[Tensor, "*n _h"]) -> Partial:
        """Every weight times `exp(log_weight)`; `log_weight` broadcasts against `[N, H]`."""
        if self.log_norm is None:
            wide = wide_dtype(self.out)
            return Partial(self.out.to(wide) * log_weight.exp().unsqueeze(-1).to(wide), None)
        return Partial(self.out, self.log_norm + log_weight.to(self.log_norm.dtype))


def log_kappa(others: Int[Tensor, "*n"], met: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """`log κ`, κ = (n − 1) / |S|: how many others there are for each that was met; 0 for a token that met nobody."""
    return torch.where(met > 0, others.double() / met.clamp(min=1), 1.0).log()
