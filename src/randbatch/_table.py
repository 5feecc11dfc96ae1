"""Tables of named objects: a name resolves to an object, and an object is taken wherever a name is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from torch import nn

from randbatch._checks import check_choice
from randbatch._errors import InvalidType, InvalidValue

__all__ = ["Table"]

T = TypeVar("T")
C = TypeVar("C", bound=type)


_tables: dict[str, Any] = {}


def _found(argument: str) -> Any:
    return _tables[argument]


class Table(Mapping[str, T], Generic[T]):
    """Objects of one class by name, in the order in which they were added.

    Args:
        argument: what an argument that takes such an object is called in error messages.
        of: the class of the objects.

    Example:
        >>> shapes = Table("shape", tuple)
        >>> shapes.add("square", (2, 2))
        >>> shapes.resolve("square"), shapes.resolve((3, 1))
        ((2, 2), (3, 1))
    """

    def __init__(self, argument: str, of: type[T]) -> None:
        self._argument, self._of = argument, of
        _tables[argument] = self
        self._entries: dict[str, T | Callable[[], T]] = {}

    def add(self, name: str, entry: T | Callable[[], T]) -> None:
        """Add an object, or a function that makes a new one at each use.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise InvalidValue(f"{self._argument} {name!r} is registered already: choose another name")
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[C], C]:
        """What adds a class, above its definition: one object of it, or of an `nn.Module` a new one at each use.

        The class gets its name as the attribute `name`.

        Raises:
            TypeError: what is decorated is no subclass of the table's class.
            ValueError: the name is taken.
        """

        def register_class(cls: C) -> C:
            made: Any = cls
            if not (isinstance(made, type) and issubclass(made, self._of)):
                raise InvalidType(f"{self._argument} must be a subclass of {self._of.__name__}, got {made!r}")
            named: Any = cls
            named.name = name
            self.add(name, named if issubclass(made, nn.Module) else named())
            return cls

        return register_class

    def remove(self, name: str) -> None:
        """Remove the object of this name, if there is one."""
        self._entries.pop(name, None)

    def resolve(self, entry: str | T) -> T:
        """The object of a name, or the object itself.

        Raises:
            TypeError: it is neither.
            ValueError: there is no object of this name; the message lists the names.
        """
        if isinstance(entry, str):
            return self[entry if entry in self._entries else check_choice(self._argument, entry, self._entries)]
        if isinstance(entry, self._of):
            return entry
        kind = type(cast(Any, entry)).__name__
        raise InvalidType(f"{self._argument} must be a name, or an object of {self._of.__name__}, got {kind}")

    def __reduce__(self) -> Any:
        return _found, (self._argument,)

    def __getitem__(self, name: str) -> T:
        entry = self._entries[name]
        made: Any = entry
        return made if isinstance(entry, self._of) else made()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
