"""Compiled and exported, cell by cell, in one process without the run-time checks of the tests."""

import compiled
import pytest
from harness import cells, check, skip_if_not_here
from table import SECTIONS

ALL = SECTIONS["compiled"], SECTIONS["sizes"], SECTIONS["tracers"]

PLAIN = "random_batch_attention: plain"


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], str]:
    table = [(key, name) for section in ALL for key in section.rows() for name in section.columns]
    return compiled.in_one_process([*table, (PLAIN, "mark_dynamic")])


@cells(SECTIONS["compiled"], compiled.COLUMNS)
def test_cell(key: str, name: str, found: dict[tuple[str, str], str]) -> None:
    skip_if_not_here(key)
    check(SECTIONS["compiled"], key, name, found[key, name])


@cells(SECTIONS["sizes"], compiled.COLUMNS_OF_SIZES)
def test_sizes(key: str, name: str, found: dict[tuple[str, str], str]) -> None:
    skip_if_not_here(key)
    check(SECTIONS["sizes"], key, name, found[key, name])


@cells(SECTIONS["tracers"], compiled.COLUMNS_OF_TRACERS)
def test_tracers(key: str, name: str, found: dict[tuple[str, str], str]) -> None:
    skip_if_not_here(key)
    check(SECTIONS["tracers"], key, name, found[key, name])


def test_the_op_for_any_number_of_tokens(found: dict[tuple[str, str], str]) -> None:
    """What the page says to do where every dimension is dynamic."""
    assert found[PLAIN, "mark_dynamic"] == "yes"
