"""Conversion rules for the modules of libraries: one file each, whose `RULES` are its rules.

`randbatch.convert` loads them when it is first called.
"""

from __future__ import annotations

__all__ = ["LIBRARIES"]

LIBRARIES: dict[str, str | None] = {
    "torch_nn": None,
    "pyg": "torch_geometric",
    "hf": None,
    "timm": None,
}
"""The files, and the package that has to be loaded before a file can be: no model holds its modules otherwise."""
