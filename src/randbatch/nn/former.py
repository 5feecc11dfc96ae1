"""`layer.sampling`, the former name of `layer.randbatch_config`: it works for one release, with a warning."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from randbatch.nn.config import ATTRIBUTE, RandomBatchConfig

__all__ = ["NAME", "FormerName"]

NAME = "sampling"


class FormerName:
    """The attribute `sampling` of a class whose modules hold their settings as `ATTRIBUTE`.

    A user's class may have an attribute of that name: a module's own value comes first and carries no warning.
    """

    def __get__(self, module: nn.Module | None, owner: type[nn.Module] | None = None) -> Any:
        if module is None:
            return self
        held = vars(module)
        for place in (held, *(held.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules"))):
            if NAME in place:
                return place[NAME]
        settings = getattr(module, ATTRIBUTE)  # AttributeError: the module has neither
        _warn(module, stacklevel=3)
        return settings

    def __set__(self, module: nn.Module, value: Any) -> None:
        if isinstance(value, RandomBatchConfig) and NAME not in vars(module) and ATTRIBUTE in vars(module):
            _warn(module, stacklevel=4)  # torch's `Module.__setattr__` stands between
            setattr(module, ATTRIBUTE, value)
        else:
            vars(module)[NAME] = value

    def __delete__(self, module: nn.Module) -> None:
        if NAME not in vars(module):
            raise AttributeError(f"{type(module).__name__} has no attribute {NAME!r} of its own")
        del vars(module)[NAME]


def _warn(module: nn.Module, stacklevel: int) -> None:
    warnings.warn(
        f"`{NAME}` of {type(module).__name__} is now called `{ATTRIBUTE}`; the former name goes with the next release",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
