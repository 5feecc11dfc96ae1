"""A cell is a function of a row: it returns (yes), or raises; what it raises is a refusal only if the table says so."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from subjects import Subject, subjects
from table import Section, expected

Column = Callable[[Subject], None]


def observe(column: Column, subject: Subject) -> str:
    """ "yes", "error: …" or "wrong: …"."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*performance", UserWarning)  # torch's own, about its vmap
            column(subject)
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"
    return "yes"


def cells(section: Section, columns: Mapping[str, Any]) -> Any:
    """Every cell of a section, as parameters of a test."""
    assert set(columns) == set(section.columns), set(columns) ^ set(section.columns)
    pairs = [(key, name) for key in section.rows() for name in section.columns]
    return pytest.mark.parametrize(("key", "name"), pairs, ids=[f"{key} | {name}" for key, name in pairs])


def skip_if_not_here(key: str) -> None:
    reason = subjects()[key].why_not_here()
    if reason is not None:
        pytest.skip(reason)


def check(section: Section, key: str, name: str, found: str) -> None:
    """What was found is what the table says."""
    want = expected(section, subjects()[key], name)
    if want is None:
        assert found == "yes", found
        return
    assert found.startswith("error: "), f"{found}, and the table says it is refused: {want.sentence}"
    plain = re.sub(r"\s+", " ", found)
    assert want.sentence in plain, f"{found}, and the table says: {want.sentence}"


def check_cell(section: Section, columns: Mapping[str, Column], key: str, name: str) -> None:
    """Run one cell here."""
    skip_if_not_here(key)
    check(section, key, name, observe(columns[name], subjects()[key]))


def all_are(statuses: Iterable[str], status: str) -> bool:
    return all(each == status for each in statuses)
