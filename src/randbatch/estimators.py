"""How in-batch outputs become an estimate of attention over the whole set, and how rounds are merged.

Shape letters: N tokens, H heads, D head size of query and key, Dv of value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from randbatch._checks import check_choice
from randbatch._shapes import Float
from randbatch.interactions import Interaction, Options
from randbatch.partition import Partition

__all__ = ["ESTIMATORS", "Estimator", "RoundMerger", "pick_estimator"]

Estimator = Callable[[Tensor, Tensor, Tensor, Partition, Interaction, Options], tuple[Tensor, Tensor | None]]
"""Packed query, key `[N, H, D]`, value `[N, H, Dv]` → packed output `[N, H, Dv]`, log-denominator `[N, H]` or None."""


def plain(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    partition: Partition,
    interaction: Interaction,
    options: Options,
) -> tuple[Float[Tensor, "n h dv"], Float[Tensor, "n h"] | None]:
    """The paper's estimator: the interaction over the token's own batch C in place of the whole set.

    `ŷ_i = Σ_{j∈C} w_ij v_j / Σ_{j∈C} w_ij`. Tensors come and go in batch order.

    Source: Liu, Ma, Jin, Wang, arXiv 2511.06044.
    """
    if partition.num_tokens == 0:
        return value.clone(), value.new_zeros(value.shape[:2])
    blocks = zip(*(partition.split(packed) for packed in (query, key, value)), strict=True)
    outs, log_norms = zip(*(interaction(q, k, v, options) for q, k, v in blocks), strict=True)
    return partition.join(outs), partition.join(log_norms) if options.need_log_norm else None


ESTIMATORS: dict[str, Estimator] = {"plain": plain}


def pick_estimator(name: str) -> Estimator:
    """The estimator called `name`; a `ValueError` names the choices."""
    return ESTIMATORS[check_choice("estimator", name, ESTIMATORS)]


class RoundMerger:
    """Merge rounds one at a time, as if numerators and denominators had been added: memory does not grow with R.

    `ŷ = Σ_r Z_r ŷ_r / Σ_r Z_r`, with Z_r the denominator of round r, kept as a logarithm. Averaging outputs instead
    would keep the O(1/p) bias of each round's ratio.
    """

    def __init__(self) -> None:
        self._out: Tensor | None = None
        self._log_norm: Tensor | None = None
        self._dtype = torch.float32

    def add(self, out: Float[Tensor, "n h dv"], log_norm: Float[Tensor, "n h"] | None) -> None:
        """Take one round in token order. `log_norm` may be None only if this is the one round there is."""
        if self._out is None:
            self._out, self._log_norm, self._dtype = out, log_norm, out.dtype
            return
        if self._log_norm is None or log_norm is None:
            raise ValueError("log_norm must be given for every round when there is more than one")
        total = torch.logaddexp(self._log_norm, log_norm)
        old, new = (self._log_norm - total).exp(), (log_norm - total).exp()
        self._out = self._out * old.unsqueeze(-1) + out * new.unsqueeze(-1)  # in the dtype of the norms: >= fp32
        self._log_norm = total

    def result(self) -> Float[Tensor, "n h dv"]:
        """The merged output, in the dtype of the rounds."""
        if self._out is None:
            raise ValueError("no round was added")
        return self._out.to(self._dtype)
