"""Derivatives and transforms, cell by cell."""

import derivatives
from harness import cells, check_cell
from table import SECTIONS

SECTION = SECTIONS["derivatives"]


@cells(SECTION, derivatives.COLUMNS)
def test_cell(key: str, name: str) -> None:
    check_cell(SECTION, derivatives.COLUMNS, key, name)
