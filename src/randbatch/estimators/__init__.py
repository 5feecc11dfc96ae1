"""How in-batch outputs become an estimate of attention over the whole set.

Shape letters: N tokens, H heads, D head size of query and key, Dv of value.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from randbatch._checks import check_choice
from randbatch.estimators.control_variate import corrected
from randbatch.estimators.in_batch import debiased, plain
from randbatch.interactions import Options
from randbatch.orthogonal import Rounds

__all__ = ["ESTIMATORS", "Estimator", "pick_estimator"]

Estimator = Callable[[Tensor, Tensor, Tensor, Rounds, str, Options], Tensor]
"""Query and key `[N, H, D]`, value `[N, H, Dv]`, the rounds, the name of an interaction → output `[N, H, Dv]`."""

ESTIMATORS: dict[str, Estimator] = {"plain": plain, "debiased": debiased, "corrected": corrected}


def pick_estimator(name: str) -> Estimator:
    """The estimator called `name`; a `ValueError` names the choices."""
    return ESTIMATORS[check_choice("estimator", name, ESTIMATORS)]
