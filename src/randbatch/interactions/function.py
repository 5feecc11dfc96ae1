"""Any function of a set as an interaction: what `RandomBatch` and adapters of linear attentions wrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from randbatch._errors import InvalidValue
from randbatch._shapes import Shaped
from randbatch.interactions.base import Block, Debias, Interaction, Kind
from randbatch.interactions.options import Options
from randbatch.partition import Partition

__all__ = ["Function"]

_NOTHING = Block(Options(), torch.zeros(1, dtype=torch.int64))  # a function asks nothing of it


class Function(Interaction):
    """`y_C = f(x_C)` for every random batch C, with `f: [M, P, C] -> [M, P, C']`.

    Nothing is known about it, so several rounds are averaged and only the estimator `plain` serves it.

    Args:
        function: gets whole batches of equal size, never padding and never a mask.
    """

    name = "function"
    kind = Kind.FUNCTION
    projections = ("x",)
    can_trace = is_closed = True

    def __new__(cls, function: Callable[[Tensor], Tensor]) -> Function:
        """Without a key: no operator can hold it, and it is made while `torch.compile` traces."""
        return object.__new__(cls)

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def attend(self, block: Block, *projected: Shaped[Tensor, "m p ..."]) -> Shaped[Tensor, "m p ..."]:
        """The function of every batch.

        Raises:
            ValueError: it returns something else than a row for each token.
        """
        (x,) = projected
        out = self.function(x)
        if out.shape[:2] != x.shape[:2]:
            raise InvalidValue(f"the module must map {list(x.shape)} to [B, N, C'], it returned {list(out.shape)}")
        return out

    def in_batches(
        self,
        part: Partition,
        projected: Sequence[Shaped[Tensor, "n ..."]],
        options: Options,
        debias: Debias = 0.0,
    ) -> Shaped[Tensor, "n ..."]:
        """The function of the batches of every size; it is told nothing of their sets."""
        return part.map_blocks(self._apply, *projected)[0]

    def _apply(self, position: int, block: Tensor) -> tuple[Tensor, ...]:
        return (self.attend(_NOTHING, block),)

    def of_nothing(self, projected: Sequence[Shaped[Tensor, "n ..."]]) -> Shaped[Tensor, "n ..."]:
        """The function still decides the width of the output."""
        return self.attend(_NOTHING, projected[0].unsqueeze(0)).flatten(0, 1)
