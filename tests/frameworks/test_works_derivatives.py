"""Derivatives and transforms, cell by cell."""

import derivatives
import pytest
from harness import cells, check_cell
from table import SECTIONS

SECTION = SECTIONS["derivatives"]


@pytest.mark.unchecked  # `test_works_memory` calls every row with annotations checked
@cells(SECTION, derivatives.COLUMNS)
def test_cell(key: str, name: str) -> None:
    check_cell(SECTION, derivatives.COLUMNS, key, name)
