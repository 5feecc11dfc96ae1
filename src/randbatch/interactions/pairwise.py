"""Interactions that are given by the weight of a pair of tokens; they hold the P² weights of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._numerics import wide_dtype
from randbatch._shapes import Float
from randbatch.interactions.base import Block, Interaction, Kind, not_self
from randbatch.interactions.merge import Partial
from randbatch.interactions.options import Options

__all__ = ["Pairwise"]

_HELD = 5  # the weights, what they are made of, and the gradients of both


class Pairwise(Interaction):
    """`Σ_j w_ij v_j` (`Kind.SUM`) or `Σ_j w_ij v_j / Σ_j w_ij` (`Kind.RATIO`), for any weight of a pair.

    A subclass sets `kind` and defines `pair`. With `kind = Kind.RATIO` that is the *logarithm* of the weight, with
    `Kind.SUM` the weight itself. The last projection holds the values; `pair` gets all others.

    Example:
        >>> class Cosine(Pairwise):
        ...     '''Softmax of the cosines of queries and keys.'''
        ...     kind = Kind.RATIO
        ...     def pair(self, block, query, key):
        ...         q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        ...         return torch.einsum("mqhd,mphd->mqhp", q, k)
    """

    def pair(self, block: Block, *projected: Float[Tensor, "m p h _"]) -> Float[Tensor, "m p h p"]:
        """The weight of every query (second dimension) and key (last), or its logarithm."""
        raise NotImplementedError(f"{type(self).__name__} does not define `pair`")

    def attend(self, block: Block, *projected: Float[Tensor, "m p h _"]) -> Float[Tensor, "m p h e"]:
        """All tokens of the batch, the token itself among them."""
        return self._sum(block, projected, self._pair(block, projected)).out.to(projected[-1].dtype)

    def partial(self, block: Block, *projected: Float[Tensor, "m p h _"]) -> Partial:
        """All tokens of the batch but the token itself."""
        pair = self._pair(block, projected)
        allowed = not_self(pair.shape[1], pair.device)
        nothing = -torch.inf if self.kind is Kind.RATIO else 0.0
        return self._sum(block, projected, pair.masked_fill(~allowed, nothing))

    def own(self, block: Block, *projected: Float[Tensor, "n h _"]) -> Partial:
        """The token itself: a batch of one."""
        singles = [x.unsqueeze(1) for x in projected]
        found = self._sum(block, singles, self._pair(block, singles))
        return Partial(found.out.squeeze(1), None if found.log_norm is None else found.log_norm.squeeze(1))

    def elements_per_token(self, width: int, sizes: Sequence[tuple[int, int]], like: Tensor, options: Options) -> int:
        """The weights of a row."""
        return _HELD * sizes[0][0] * width

    def _pair(self, block: Block, projected: Sequence[Tensor]) -> Tensor:
        """`pair` in at least fp32."""
        wide = wide_dtype(projected[0])
        with torch.autocast(projected[0].device.type, enabled=False):  # autocast would round the weights again
            return self.pair(block, *(x.to(wide) for x in projected[:-1]))

    def _sum(self, block: Block, projected: Sequence[Tensor], pair: Tensor) -> Partial:
        """In at least fp32."""
        value = projected[-1]
        log_norm = None
        with torch.autocast(value.device.type, enabled=False):
            if self.kind is Kind.RATIO:
                # a row without any key has the weights 0, and no NaN in any derivative
                empty = pair.detach().isneginf().all(dim=-1, keepdim=True)
                pair = pair.masked_fill(empty, 0.0)
                log_norm = pair.logsumexp(dim=-1, keepdim=True)
                pair = (pair - log_norm).exp().masked_fill(empty, 0.0)
                log_norm = log_norm.masked_fill(empty, -torch.inf).squeeze(-1)
            pair = F.dropout(pair, block.options.dropout_p)
            return Partial(torch.einsum("mqhp,mphe->mqhe", pair, value.to(pair.dtype)), log_norm)
