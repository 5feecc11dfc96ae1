"""Self-attention as an interaction of tokens, normalised (SA) and unnormalised (USA), with any Q, K, V and heads.

Shape letters: B sets, m tokens in each, n of them that are looked at, D dimensions, H heads, K size of query and key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch._checks import check_choice
from randbatch._shapes import Float
from randbatch.particles.interaction import Interaction, Sets

__all__ = ["SoftmaxAttention", "UnnormalisedAttention"]


@dataclass(frozen=True, eq=False)
class _Attention(Interaction):
    """Logits `s_ij = β ⟨Q x_i, K x_j⟩` of each head, and values `V x_j`.

    Args:
        beta: β, the inverse temperature; 1/√K is a transformer's. Default: 1.
        query: Q `[H, K, D]`. Default: one head with the identity.
        key: K `[H, K, D]`. Default: the identity.
        value: V `[H, D, D]`, with the output projection in it; heads are added. Default: the identity.
    """

    beta: float = 1.0
    query: Float[Tensor, "h k d"] | None = None
    key: Float[Tensor, "h k d"] | None = None
    value: Float[Tensor, "h d d"] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.beta):
            raise ValueError(f"beta must be finite, got {self.beta}")
        shapes = {name: getattr(self, name) for name in ("query", "key", "value") if getattr(self, name) is not None}
        for name, matrix in shapes.items():
            if matrix.dim() != 3:
                raise ValueError(f"{name} must have shape [heads, rows, D], got {list(matrix.shape)}")
        heads = {name: matrix.shape[0] for name, matrix in shapes.items() if matrix.shape[0] != 1}
        if len(set(heads.values())) > 1:
            raise ValueError(f"query, key and value must have as many heads as each other, got {heads}")

    def _logits(self, sets: Sets, rows: slice) -> Float[Tensor, "b h n m"]:
        return (_map(self.query, sets.x[:, rows]) * self.beta) @ _map(self.key, sets.x).mT

    def _mix(self, weights: Float[Tensor, "b h n m"], sets: Sets) -> Float[Tensor, "b n d"]:
        mixed = weights @ sets.x.unsqueeze(1)  # V is linear: it may come last, where there are n rows and not m
        return mixed.sum(dim=1) if self.value is None else torch.einsum("bhnd,hed->bne", mixed, self.value.to(mixed))


def _map(matrix: Tensor | None, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n k"]:
    return x.unsqueeze(1) if matrix is None else x.unsqueeze(1) @ matrix.to(x).mT


def _diagonal(pairs: Float[Tensor, "b h n m"], rows: slice) -> Tensor:
    """The entry of each token and itself, a view that can be written to."""
    return pairs.diagonal(offset=rows.start, dim1=2, dim2=3)


_DEBIAS = {"plain": 0.0, "debiased": 1.0}  # δ


@dataclass(frozen=True, eq=False)
class SoftmaxAttention(_Attention):
    """`F_i = Σ_h V_h Σ_j softmax_j(β ⟨Q_h x_i, K_h x_j⟩) x_j`, a token included (SA).

    Softmax is not linear in the pairs, so random batches are biased: with `"plain"` a token counts itself too much by
    κ = (N−1)/(m−1). `"debiased"` adds log κ to the logits of the others: numerator and denominator are unbiased, the
    ratio keeps a bias of order 1/m. Both are the same in a whole set.

    Args:
        beta: β, the inverse temperature; 1/√K is a transformer's. Default: 1.
        query: Q `[H, K, D]`. Default: one head with the identity.
        key: K `[H, K, D]`. Default: the identity.
        value: V `[H, D, D]`, with the output projection in it; heads are added. Default: the identity.
        estimator: `"plain"` or `"debiased"`. Default: `"plain"`, the attention of the paper.

    Raises:
        ValueError: β is not finite, a matrix that is not `[H, rows, D]`, unequal heads, an unknown estimator.

    Source: Geshkovski, Letrouit, Polyanskiy, Rigollet, arXiv 2312.10794, equation SA.

    Example:
        >>> tokens = torch.nn.functional.normalize(torch.randn(1, 6, 3), dim=2)
        >>> flat = SoftmaxAttention(beta=0.0).force(Sets(tokens, population=6), slice(0, 6))
        >>> torch.allclose(flat, tokens.mean(dim=1, keepdim=True).expand_as(flat), atol=1e-6)
        True
    """

    estimator: str = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("estimator", self.estimator, _DEBIAS)

    def force(self, sets: Sets, rows: slice) -> Float[Tensor, "b n d"]:
        """What the tokens `rows` of every set attend to, `[B, n, D]`."""
        logits = self._logits(sets, rows)
        debias = _DEBIAS[self.estimator]
        if debias:
            _diagonal(logits, rows).sub_(debias * math.log(sets.stands_for))  # as a shift of the others
        return self._mix(logits.softmax(dim=-1), sets)


@dataclass(frozen=True, eq=False)
class UnnormalisedAttention(_Attention):
    """`F_i = Σ_h V_h 1/N Σ_j exp(β ⟨Q_h x_i, K_h x_j⟩) x_j`, a token included (USA): unbiased under random batches.

    In a random batch the others count κ = (N−1)/(m−1) times, a token itself once.

    Args:
        beta: β, the inverse temperature. Default: 1.
        query: Q `[H, K, D]`. Default: one head with the identity.
        key: K `[H, K, D]`. Default: the identity.
        value: V `[H, D, D]`; heads are added. Default: the identity.

    Raises:
        ValueError: β is not finite, a matrix that is not `[H, rows, D]`, or unequal heads.

    Source: Geshkovski, Letrouit, Polyanskiy, Rigollet, arXiv 2312.10794, equation USA.

    Example:
        >>> tokens = torch.eye(2).unsqueeze(0)
        >>> UnnormalisedAttention(beta=0.0).force(Sets(tokens, population=2), slice(0, 2))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """

    def force(self, sets: Sets, rows: slice) -> Float[Tensor, "b n d"]:
        """The force on the tokens `rows` of every set, `[B, n, D]`."""
        weights = self._logits(sets, rows).exp_().mul_(sets.stands_for / sets.population)
        _diagonal(weights, rows).div_(sets.stands_for)
        return self._mix(weights, sets)
