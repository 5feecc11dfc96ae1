"""Autocast and half precision, cell by cell."""

import precision
from harness import cells, check_cell
from table import SECTIONS

SECTION = SECTIONS["precision"]


@cells(SECTION, precision.COLUMNS)
def test_cell(key: str, name: str) -> None:
    check_cell(SECTION, precision.COLUMNS, key, name)
