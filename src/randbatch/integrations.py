"""The former home of what is in `randbatch.conversion` now; it goes with the next release."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from randbatch import conversion

if TYPE_CHECKING:
    from randbatch.conversion import RandomBatches, hf

__all__ = ["RandomBatches", "hf"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"randbatch.integrations.{name} is now randbatch.conversion.{name}; the former place goes with the next "
        "release",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(conversion, name)
