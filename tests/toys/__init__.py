"""One entry for every table, each a file that needs no other to be touched: what CONTRIBUTING describes.

Importing such a file registers what it defines. Tests take them inside `registered`, so that others do not see them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from randbatch.estimators import ESTIMATORS
from randbatch.interactions import INTERACTIONS
from randbatch.kernels import BACKENDS

TOYS = ("interaction", "summed", "learned", "statistics", "two_axes", "estimator", "backend")
TABLES = (INTERACTIONS, ESTIMATORS, BACKENDS)
_inside = False


@contextmanager
def registered() -> Iterator[None]:
    """Within it, the tables hold the toys."""
    global _inside
    if _inside:
        yield
        return
    before = [set(table) for table in TABLES]
    for toy in TOYS:
        module = sys.modules.get(f"{__name__}.{toy}")
        if module is None:
            importlib.import_module(f"{__name__}.{toy}")
        else:
            importlib.reload(module)  # what was removed registers again
    _inside = True
    try:
        yield
    finally:
        _inside = False
        for table, names in zip(TABLES, before, strict=True):
            for name in set(table) - names:
                table.remove(name)
