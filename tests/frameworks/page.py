"""`docs/works_with.md`, from the table alone."""

from __future__ import annotations

from collections.abc import Iterator

from refusals import Refusal
from subjects import subjects
from table import SECTIONS, Section, expected

HEAD = """\
# What works with what

Every cell of these tables is a test. *Yes* means that the numbers are those of an independent calculation, which each
part names; a number says why and how it is refused: an exception whose text is the sentence listed
[at the end](#what-is-refused). Nothing in between is taken: no number is ever another one without a word.

This page is written by `tests/scripts/works_with.py`, and the tests fail if it says anything else than they found. Rows
that behave alike stand together.
"""


def _statuses(section: Section, key: str, numbers: dict[str, int]) -> tuple[str, ...]:
    found = (expected(section, subjects()[key], column) for column in section.columns)
    return tuple("yes" if refusal is None else str(_number(refusal, numbers)) for refusal in found)


def _number(refusal: Refusal, numbers: dict[str, int]) -> int:
    return numbers.setdefault(_sentence(refusal), len(numbers) + 1)


def _sentence(refusal: Refusal) -> str:
    said = f"“{refusal.sentence}”"
    return said if not refusal.instead else f"{said} {refusal.instead}"


def _rows(section: Section, numbers: dict[str, int]) -> Iterator[str]:
    """One line for all rows of a group with the same statuses, in the order of the first."""
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for key in section.rows():
        row = subjects()[key]
        alike.setdefault((row.group, _statuses(section, key, numbers)), []).append(row.name)
    group_before = None
    for group in dict.fromkeys(group for group, _ in alike):
        for (owner, statuses), names in alike.items():
            if owner == group:
                title = f"`{group}`" if group != group_before else ""
                group_before = group
                yield f"| {title} | {_names(names)} | {' | '.join(statuses)} |"


def _names(names: list[str]) -> str:
    return "; ".join(names).replace("|", "\\|")


def _part(section: Section, numbers: dict[str, int]) -> Iterator[str]:
    yield f"## {section.title}\n"
    yield f"{section.text}\n"
    yield from (f"- *{name}*: {what}" for name, what in section.columns.items())
    yield ""
    yield f"| | options | {' | '.join(section.columns)} |"
    yield f"|---|---|{'---|' * len(section.columns)}"
    yield from _rows(section, numbers)
    yield ""


def write() -> str:
    """The page."""
    numbers: dict[str, int] = {}
    parts = [line for section in SECTIONS.values() for line in _part(section, numbers)]
    refused = [f"{number}. {sentence}" for sentence, number in numbers.items()]
    return "\n".join([HEAD, *parts, "## What is refused\n", *refused, ""])
