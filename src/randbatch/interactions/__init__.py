"""What a token does with those it meets in its random batch, one file for each mechanism.

Every interaction is an object that declares what it can do (`Interaction`). A name resolves to one; an object is taken
wherever a name is. `register` puts a class into the table:

    @rb.interactions.register("cosine")
    class Cosine(rb.interactions.Pairwise): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from randbatch._table import Table
from randbatch.interactions.base import Block, Interaction, Kind, Sets
from randbatch.interactions.function import Function
from randbatch.interactions.linear import Linear
from randbatch.interactions.merge import Partial
from randbatch.interactions.options import Options
from randbatch.interactions.pairwise import Pairwise
from randbatch.interactions.softmax import Softmax

__all__ = [
    "INTERACTIONS",
    "Block",
    "Function",
    "Interaction",
    "Kind",
    "Linear",
    "Options",
    "Pairwise",
    "Partial",
    "Sets",
    "Softmax",
    "register",
]

_C = TypeVar("_C", bound=type[Interaction])

INTERACTIONS: Table[Interaction] = Table("interaction", Interaction)
Interaction.table = INTERACTIONS


def register(name: str) -> Callable[[_C], _C]:
    """Add a class of interactions to the table, above its definition.

    A class without parameters is made once and shared; of an `nn.Module` every layer gets one of its own.

    Args:
        name: what `interaction=` takes; the class gets it as its attribute `name`.

    Raises:
        TypeError: what is decorated is not a class of interactions, or cannot be made without arguments.
        ValueError: the name is taken.
    """
    return INTERACTIONS.register(name)


register("softmax")(Softmax)
register("linear")(Linear)
