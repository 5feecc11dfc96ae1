"""How in-batch outputs become an estimate of the interaction over the whole set, one file for each idea.

Every estimator is an object that declares what it can do (`Estimator`). A name resolves to one; an object is taken
wherever a name is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from randbatch._table import Table
from randbatch.estimators.base import Estimator
from randbatch.estimators.corrected import Corrected
from randbatch.estimators.in_batch import Debiased, Plain

__all__ = ["ESTIMATORS", "Corrected", "Debiased", "Estimator", "Plain", "register"]

_C = TypeVar("_C", bound=type[Estimator])

ESTIMATORS: Table[Estimator] = Table("estimator", Estimator)
Estimator.table = ESTIMATORS


def register(name: str) -> Callable[[_C], _C]:
    """Add a class of estimators to the table, above its definition.

    Args:
        name: what `estimator=` takes; the class gets it as its attribute `name`.

    Raises:
        TypeError: what is decorated is not a class of estimators.
        ValueError: the name is taken.
    """
    return ESTIMATORS.register(name)


register("plain")(Plain)
register("debiased")(Debiased)
register("corrected")(Corrected)
