"""Weights that are not plain parameters, cell by cell."""

import pytest
import weights
from harness import cells, check_cell
from table import SECTIONS

SECTION = SECTIONS["weights"]


@pytest.mark.unchecked  # `test_works_memory` calls every row with annotations checked
@cells(SECTION, weights.COLUMNS)
def test_cell(key: str, name: str) -> None:
    check_cell(SECTION, weights.COLUMNS, key, name)
