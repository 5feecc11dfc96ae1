"""Two processes by gloo, cell by cell; they are started once."""

import distributed
import pytest
from harness import cells, check, skip_if_not_here
from table import SECTIONS

SECTION = SECTIONS["distributed"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return distributed.in_two_processes(tmp_path_factory.mktemp("store"))


@cells(SECTION, distributed.COLUMNS)
def test_cell(key: str, name: str, found: dict[str, dict[str, str]]) -> None:
    skip_if_not_here(key)
    check(SECTION, key, name, found[key][name])
