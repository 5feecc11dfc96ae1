"""Copies and states, cell by cell; one new process unpickles all rows."""

import copies
import pytest
from harness import cells, check, check_cell, skip_if_not_here
from table import SECTIONS


@pytest.fixture(scope="module")
def unpickled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return copies.in_a_new_process(tmp_path_factory.mktemp("pickles"))


@cells(SECTIONS["copies"], {**copies.COLUMNS, "pickle": None})
def test_cell(key: str, name: str, unpickled: dict[str, str]) -> None:
    if name == "pickle":
        skip_if_not_here(key)
        check(SECTIONS["copies"], key, name, unpickled[key])
    else:
        check_cell(SECTIONS["copies"], copies.COLUMNS, key, name)


@cells(SECTIONS["state"], copies.COLUMNS_OF_LAYER)
def test_state(key: str, name: str) -> None:
    check_cell(SECTIONS["state"], copies.COLUMNS_OF_LAYER, key, name)
