"""Checkpoints and the like, cell by cell."""

import memory
from harness import cells, check_cell
from table import SECTIONS

SECTION = SECTIONS["memory"]


@cells(SECTION, memory.COLUMNS)
def test_cell(key: str, name: str) -> None:
    check_cell(SECTION, memory.COLUMNS, key, name)
