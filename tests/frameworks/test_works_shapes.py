"""Tensors without numbers, numbers of other types, construction, cell by cell."""

import pytest
import shapes
from harness import cells, check_cell
from table import SECTIONS


@pytest.mark.unchecked  # numpy's integers are what the types do not say
@cells(SECTIONS["shapes"], shapes.COLUMNS)
def test_cell(key: str, name: str) -> None:
    check_cell(SECTIONS["shapes"], shapes.COLUMNS, key, name)


@cells(SECTIONS["construction"], shapes.COLUMNS_OF_MODULES)
def test_construction(key: str, name: str) -> None:
    check_cell(SECTIONS["construction"], shapes.COLUMNS_OF_MODULES, key, name)
