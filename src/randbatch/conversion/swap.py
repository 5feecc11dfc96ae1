"""The swap itself: another class and a few attributes for one module, and exactly what was there before, on undo.

`torch.nn.utils.parametrize` gives a module a class of its own, a child of the class that it had. Such a child is laid
over the new class as it was over the old one, so parametrizations can come and go before, between and after swaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from randbatch._errors import InvalidValue

__all__ = ["Undo", "bare_class", "set_attributes", "set_class", "undo_each", "why_taken"]

Undo = Callable[[], None]


def undo_each(*steps: Undo) -> Undo:
    """Undo these, in this order."""

    def undo() -> None:
        for step in steps:
            step()

    return undo


def bare_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module below its parametrizations."""
    return parametrize.type_before_parametrizations(module)


def _set_bare_class(module: nn.Module, cls: type[nn.Module]) -> None:
    own = type(module)
    if parametrize.is_parametrized(module):
        content = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
        metaclass: Any = type(own)
        cls = metaclass(f"Parametrized{cls.__name__}", (cls,), content)
    module.__class__ = cls


def set_class(module: nn.Module, cls: type[nn.Module]) -> Undo:
    """Give the module another class.

    Raises:
        RuntimeError: on undo, if somebody else has changed the class since; nothing was touched then.
    """
    before = bare_class(module)
    _set_bare_class(module, cls)

    def undo() -> None:
        now = bare_class(module)
        if now is not cls:
            raise RuntimeError(
                f"the class of this {before.__name__} was changed to {now.__name__} after convert; undo that first"
            )
        _set_bare_class(module, before)

    return undo


def why_taken(module: nn.Module, names: Iterable[str]) -> str | None:
    """Why the module cannot be given attributes of these names; None if it can."""
    taken = next((name for name in names if hasattr(module, name)), None)
    return None if taken is None else f"it has an attribute `{taken}` of its own, which random batches need"


def set_attributes(module: nn.Module, **values: Any) -> Undo:
    """Give the module attributes that it does not have.

    Raises:
        ValueError: it has one of that name.
    """
    reason = why_taken(module, values)
    if reason is not None:
        raise InvalidValue(f"{bare_class(module).__name__} cannot be converted: {reason}")
    for name, value in values.items():
        setattr(module, name, value)

    def undo() -> None:
        for name in values:
            vars(module).pop(name, None)

    return undo
