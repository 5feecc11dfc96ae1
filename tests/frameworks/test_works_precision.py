"""Autocast and half precision, cell by cell."""

import precision
import pytest
from harness import cells, check_cell
from table import SECTIONS

SECTION = SECTIONS["precision"]


@pytest.mark.unchecked  # `test_works_memory` calls every row with annotations checked
@cells(SECTION, precision.COLUMNS)
def test_cell(key: str, name: str) -> None:
    check_cell(SECTION, precision.COLUMNS, key, name)
