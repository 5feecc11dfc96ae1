"""What happens inside a random batch: softmax or linear attention.

An interaction is normalised, `y_i = Σ_j w_ij v_j / Σ_j w_ij`; it returns the ratio and, if asked, the logarithm of the
denominator, by which the rounds of several partitions are merged.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from randbatch._checks import check_choice
from randbatch.interactions.linear import linear_attention
from randbatch.interactions.options import Options
from randbatch.interactions.softmax import softmax_attention
from randbatch.partition import Partition

__all__ = ["INTERACTIONS", "Interaction", "Options", "pick_interaction"]

Interaction = Callable[[Tensor, Tensor, Tensor, Partition, Options], tuple[Tensor, Tensor | None]]
"""Query and key `[N, H, D]`, value and output `[N, H, Dv]`, log-denominator `[N, H]` or None, all in token order."""

INTERACTIONS: dict[str, Interaction] = {
    "softmax": softmax_attention,
    "linear": linear_attention,
}


def pick_interaction(name: str) -> Interaction:
    """The interaction called `name`; a `ValueError` names the choices."""
    return INTERACTIONS[check_choice("interaction", name, INTERACTIONS)]
