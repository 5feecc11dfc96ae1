"""All estimators at a few tokens, round after round: what it takes to know their error without computing it all.

Shape letters: N tokens, H heads, S tokens looked at for each head, D head size of query and key, E of value.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from randbatch._shapes import Float, Int
from randbatch.estimators.anchors import Anchors, set_field
from randbatch.estimators.at_tokens import AtTokens, SetsOf, attend_exactly, rows_of
from randbatch.estimators.mean_field import Moments, value_range
from randbatch.partition import Partition

__all__ = ["SampledEstimates"]


class SampledEstimates:
    """What estimators give at chosen tokens `[H, S]`, for the rounds that were added so far.

    The weights of `corrected` are fitted to its own anchors, which are other tokens.
    """

    def __init__(
        self,
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h e"],
        tokens: Int[Tensor, "h s"],
        scale: float,
        names: Iterable[str] = ("plain", "debiased", "corrected"),
    ) -> None:
        self._names = tuple(names)
        self._tensors, self._scale = (query, key, value), scale
        self._at = AtTokens(query, key, value, tokens, scale)
        self._range: list[Tensor] = []
        self._correction: tuple[Anchors, SetsOf, Tensor, Tensor] | None = None

    def add(self, part: Partition) -> None:
        """One more round; moments and anchors of `corrected` are those of the first."""
        if self._at.num_rounds == 0 and "corrected" in self._names and not part.is_whole:
            moments = Moments.of(part, *self._tensors[1:])
            sets = SetsOf(part, self._at.tokens)
            fields = set_field(self._at.query, moments, sets.own, self._scale)
            self._correction = Anchors(*self._tensors, moments, self._scale), sets, *fields
            heads = torch.arange(len(sets.own), device=sets.own.device).unsqueeze(1)
            self._range = [bound[sets.own, heads] for bound in value_range(part, self._tensors[2])]
        if self._correction is not None:
            self._correction[0].at.add(part)
        self._at.add(part)

    def outputs(self) -> dict[str, Float[Tensor, "h s e"]]:
        """What each of the estimators gives."""
        of = {"plain": lambda: self._at.local(0.0), "debiased": lambda: self._at.local(1.0), "corrected": self._correct}
        return {name: of[name]() for name in self._names}

    def _correct(self) -> Tensor:
        if self._correction is None:
            return self._at.local(0.0)  # every set in one batch: full attention
        anchors, sets, mean, linear = self._correction
        weights = anchors.fit().at(sets)
        local = self._at.local(weights.debias)
        out = weights.correct(local, linear, self._at.field, mean)
        low, high = self._range
        return torch.where(self._at.met_all.unsqueeze(-1), local, out.clamp(low.to(out.dtype), high.to(out.dtype)))

    def exact(self, part: Partition) -> Float[Tensor, "h s e"]:
        """Attention to all keys of the set; any partition of the same tokens says which those are."""
        query, key, value = self._tensors
        sets = SetsOf(part, self._at.tokens)
        rows = rows_of(query, self._at.tokens)
        return attend_exactly(rows, key, value, sets, self._scale).to(self._at.query.dtype)
