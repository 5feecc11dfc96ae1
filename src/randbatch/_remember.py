"""Partitions of a fixed seed, remembered: in eval every call of a layer draws the same one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

__all__ = ["Remembered"]


class Remembered:
    """Results of a function by its arguments, the most recently used ones, up to a number of bytes.

    Args:
        limit: bytes of all results together; a result of more than half of it is not remembered.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, key: Hashable, num_bytes: int, make: Callable[[], Any]) -> Any:
        """The result of `make` for `key`, which takes `num_bytes`."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                return found[0]
        made = make()
        if 2 * num_bytes > self._limit:
            return made
        with self._lock:
            if key not in self._held:
                self._held[key] = made, num_bytes
                self._bytes += num_bytes
            while self._bytes > self._limit:
                self._bytes -= self._held.popitem(last=False)[1][1]
        return made
