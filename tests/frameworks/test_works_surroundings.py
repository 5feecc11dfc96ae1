"""Hooks, replaced parts, and what else goes on in a process, cell by cell."""

import pytest
import surroundings
from harness import cells, check_cell
from table import SECTIONS

pytestmark = pytest.mark.unchecked  # `test_works_memory` calls every row with annotations checked


@cells(SECTIONS["surroundings"], surroundings.COLUMNS_OF_ALL)
def test_cell(key: str, name: str) -> None:
    check_cell(SECTIONS["surroundings"], surroundings.COLUMNS_OF_ALL, key, name)


@cells(SECTIONS["hooks"], surroundings.COLUMNS_OF_MODULES)
def test_hook(key: str, name: str) -> None:
    check_cell(SECTIONS["hooks"], surroundings.COLUMNS_OF_MODULES, key, name)


@cells(SECTIONS["projection"], surroundings.COLUMNS_OF_ATTENTION)
def test_projection(key: str, name: str) -> None:
    check_cell(SECTIONS["projection"], surroundings.COLUMNS_OF_ATTENTION, key, name)
