"""Settings that a file holds: read by the types of their fields, and not trusted with the place of the data."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from randbatch._errors import InvalidValue
from randbatch.train.config import Settings
from randbatch.train.data import needs_root

__all__ = ["from_json", "is_own", "stored_root"]

_OWN_DATA = Path("data")  # where data sets go by default
_PLAIN: dict[Any, tuple[type, ...]] = {
    bool: (bool,), int: (int,), float: (float, int), str: (str,), NoneType: (NoneType,),
}  # fmt: skip
_SettingsT = TypeVar("_SettingsT", bound=Settings)


def from_json(kind: type[_SettingsT], values: Mapping[str, Any], source: Path) -> _SettingsT:
    """The inverse of `to_json`; a setting that is absent has its default.

    Args:
        kind: class of the settings.
        values: what the file holds.
        source: the file.

    Raises:
        InvalidValue: a setting is unknown, has another type, or is refused by `kind`.
    """
    hints = get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise InvalidValue(f"{source} holds unknown settings: {', '.join(unknown)}")
    typed: dict[str, Any] = {}
    for name, value in values.items():
        try:
            typed[name] = _typed(hints[name], value)
        except TypeError:
            raise InvalidValue(f"{source}: {name} has no value of its type, got {repr(value)[:80]}") from None
    return kind(**typed)


def _typed(hint: Any, value: Any) -> Any:
    """A JSON value as a field of this type holds it; a `TypeError` for a value of another type."""
    origin, parts = get_origin(hint), get_args(hint)
    if type(value) in _PLAIN.get(hint, ()):
        if hint is not float or abs(value) <= sys.float_info.max:
            return value
    elif origin in (Union, UnionType):
        for part in parts:
            with contextlib.suppress(TypeError):
                return _typed(part, value)
    elif origin is tuple and isinstance(value, list):
        return tuple(_typed(parts[0], one) for one in value)
    elif origin is Literal and isinstance(value, str) and value in parts:
        return value
    elif hint is Path and isinstance(value, str):
        return Path(value)
    raise TypeError


def stored_root(source: Path, dataset: str, stored: Path, given: Path | None) -> Path:
    """The folder of the data sets for a run that says itself where they are.

    Reading a data set may run code that lies beside it, so that a run folder from somebody else must not choose the
    place: what it says is followed into the user's own folder `data` alone. A data set without such files is free.

    Args:
        source: the file that says so.
        dataset: name of the data set.
        stored: what it says.
        given: what the user says, which is always followed.

    Raises:
        InvalidValue: it leads elsewhere.
    """
    if given is not None:
        return given
    if needs_root(dataset) and not is_own(stored):
        raise InvalidValue(
            f"root: {source} says that {dataset!r} lies in {stored}; reading it may run code from there, "
            f"so that this is followed into {_OWN_DATA}/ alone: give it again, --root {shlex.quote(str(stored))}"
        )
    return stored


def is_own(root: Path) -> bool:
    """Whether a folder lies in the user's own folder of data sets."""
    try:
        return root.resolve().is_relative_to(_OWN_DATA.resolve())
    except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links
        return False
