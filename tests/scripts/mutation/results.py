"""What came of the mutants: one line each in a file that only grows, answers to survivors, and the tables."""

from __future__ import annotations

import json
import os
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mutation.source import Mutant

Record = dict[str, Any]
_COLUMNS = ("made", "run", "killed", "timeout", "answered", "open", "error")


def read_records(file: Path) -> list[Record]:
    """Every whole line; a last one that was cut off is passed over."""
    if not file.exists():
        return []
    records: list[Record] = []
    for line in file.read_text().split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append_record(file: Path, record: Record) -> None:
    """One write, so that a run that is cut off leaves no half line among whole ones."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def latest(records: Iterable[Record], mutants: Iterable[Mutant]) -> dict[str, Record]:
    """The last record of each of these mutants, of the source as it is now."""
    digests = {mutant.name: mutant.digest for mutant in mutants}
    return {record["id"]: record for record in records if digests.get(record["id"]) == record["source"]}


Key = tuple[str, str, str, str]


def key_of(mutant: Mutant) -> Key:
    """What names a mutant also after lines have moved."""
    return mutant.file, mutant.operator, mutant.before, mutant.after


def read_answers(file: Path) -> dict[Key, str]:
    """The sentences on survivors: `[[survivor]]` tables of file, operator, before, after, why."""
    if not file.exists():
        return {}
    tables = tomllib.loads(file.read_text()).get("survivor", [])
    return {(each["file"], each["operator"], each["before"], each["after"]): each["why"] for each in tables}


def write_question(mutant: Mutant) -> str:
    """The table for the file of answers, its sentence still to be written."""
    names = ("file", "operator", "before", "after")
    lines = [
        f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in zip(names, key_of(mutant), strict=True)
    ]
    return "\n".join(["[[survivor]]", *lines, 'why = ""'])


def find_stale(answers: Iterable[Key], mutants: Iterable[Mutant]) -> list[str]:
    """Of the answers, those that fit none of all mutants: their line has changed, or stands in another file."""
    there = {key_of(mutant) for mutant in mutants}
    return [f"{file}: {operator}\n    - {before}\n    + {after}" for key in answers if key not in there
            for file, operator, before, after in [key]]  # fmt: skip


def state_of(mutant: Mutant, found: Mapping[str, Record], answers: Mapping[Key, str]) -> str:
    """One of the columns: what became of a mutant."""
    record = found.get(mutant.name)
    if record is None:
        return "made"
    if record["status"] == "survived":
        return "answered" if answers.get(key_of(mutant)) else "open"
    return record["status"]


def report(parts: Mapping[str, Sequence[Mutant]], records: Iterable[Record], answers: Mapping[Key, str]) -> str:
    """Tables by part and by operator, and the survivors that are open."""
    every = [mutant for mutants in parts.values() for mutant in mutants]
    found = latest(records, every)
    states = {mutant.name: state_of(mutant, found, answers) for mutant in every}
    by_part = {part: Counter(states[mutant.name] for mutant in mutants) for part, mutants in parts.items()}
    by_operator: dict[str, Counter[str]] = {}
    for mutant in every:
        by_operator.setdefault(mutant.operator, Counter())[states[mutant.name]] += 1
    text = [_table("part", by_part), "", _table("operator", dict(sorted(by_operator.items())))]
    for state, title in (("open", "Open survivors"), ("error", "Errors")):
        named = [mutant for mutant in every if states[mutant.name] == state]
        text += ["", f"{title}: {len(named)}"]
        text += [f"{each.name}\n    - {each.before}\n    + {each.after}" for each in named]
    return "\n".join(text)


def _table(title: str, rows: Mapping[str, Counter[str]]) -> str:
    total: Counter[str] = Counter()
    for counts in rows.values():
        total.update(counts)
    lines = [[title, *_COLUMNS, "killed of those that can be"]]
    for name, counts in {**rows, "all": total}.items():
        if counts.total():
            lines.append([name, *_row(counts)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(both))
        for both in (list(zip(line, widths, strict=True)) for line in lines)
    )


def _row(counts: Counter[str]) -> list[str]:
    run = counts.total() - counts["made"]
    killed = counts["killed"] + counts["timeout"]
    can_be = run - counts["answered"] - counts["error"]
    cells = [str(counts.total()), str(run), *(str(counts[column]) for column in _COLUMNS[2:])]
    return [*cells, f"{100 * killed / can_be:.1f} %" if can_be else "-"]
