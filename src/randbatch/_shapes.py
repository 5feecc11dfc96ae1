"""Shape annotations (`Float[Tensor, "n h d"]`) that cost nothing at run time.

Annotations are never evaluated unless a checker asks for them, so the package does not need jaxtyping. The tests
import it first and check every annotated call; a type checker always sees the real names.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or sys.modules.get("jaxtyping") is not None:
    from jaxtyping import Bool, Float, Int, Shaped
else:
    Bool = Float = Int = Shaped = None

__all__ = ["Bool", "Float", "Int", "Shaped"]
