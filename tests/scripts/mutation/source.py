"""A source file as bytes, by which mutants are cut out and put in; line numbers never change."""

from __future__ import annotations

import ast
import bisect
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

Signatures = dict[str, frozenset[str]]
"""For each function and class by its name, the arguments that may be left out."""


@dataclass(frozen=True)
class Edit:
    """The bytes from `start` to before `end` become `text`; `at` is the place that the mutant is named by."""

    operator: str
    start: int
    end: int
    text: str
    at: int


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is, what it does, and the lines it changes, before and after."""

    file: str
    line: int
    column: int
    operator: str
    before: str
    after: str
    digest: str
    edit: Edit

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.column}:{self.operator}"


class Source:
    """The text of one file, and the moves from nodes of its tree to places in it."""

    def __init__(self, file: str, data: bytes, signatures: Signatures) -> None:
        self.file = file
        self.data = data
        self.signatures = signatures
        self.tree = ast.parse(data)
        self._starts = [0, *accumulate(len(line) + 1 for line in data.split(b"\n"))]

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:12]

    def span(self, node: ast.expr | ast.stmt | ast.keyword | ast.arg) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, start: int, end: int) -> str:
        return self.data[start:end].decode()

    def text_of(self, node: ast.expr) -> str:
        return self.text(*self.span(node))

    def replace(self, operator: str, node: ast.expr | ast.stmt, text: str, at: int | None = None) -> Edit:
        """The node becomes `text`, filled up with the line breaks that it had."""
        start, end = self.span(node)
        missing = self.text(start, end).count("\n") - text.count("\n")
        assert missing >= 0, f"{operator} adds lines in {self.file}:{node.lineno}"
        if missing:
            text = text + "\n" * missing if isinstance(node, ast.stmt) else f"({text}" + "\n" * missing + ")"
        return Edit(operator, start, end, text, start if at is None else at)

    def replace_between(self, operator: str, left: ast.expr, right: ast.expr, token: str, text: str) -> Edit | None:
        """The one `token` (a regular expression) between two nodes becomes `text`."""
        start, end = self.span(left)[1], self.span(right)[0]
        return self.replace_token(operator, start, end, token, text)

    def replace_token(self, operator: str, start: int, end: int, token: str, text: str) -> Edit | None:
        """The one `token` (a regular expression) from `start` to `end` becomes `text`; None where it is not alone."""
        found = list(re.finditer(token.encode(), self.data[start:end]))
        if len(found) != 1 or b"#" in self.data[start:end]:
            return None
        start, end = start + found[0].start(), start + found[0].end()
        return Edit(operator, start, end, text, start)

    def mutant(self, edit: Edit) -> Mutant:
        first, last = (bisect.bisect_right(self._starts, place) - 1 for place in (edit.start, edit.end))
        start, end = self._starts[first], min(self._starts[last + 1] - 1, len(self.data))
        after = self.data[start : edit.start].decode() + edit.text + self.data[edit.end : end].decode()
        line = bisect.bisect_right(self._starts, edit.at) - 1
        column = len(self.text(self._starts[line], edit.at)) + 1
        before, after = (" ".join(text.split()) for text in (self.text(start, end), after))
        return Mutant(self.file, line + 1, column, edit.operator, before, after, self.digest, edit)

    def apply(self, edit: Edit) -> bytes:
        return self.data[: edit.start] + edit.text.encode() + self.data[edit.end :]


def read_signatures(files: Iterable[Path]) -> Signatures:
    """What may be left out in calls of the functions and classes of these files; of equal names, what all allow."""
    found: dict[str, frozenset[str]] = {}

    def add(name: str, defaults: frozenset[str]) -> None:
        found[name] = found[name] & defaults if name in found else defaults

    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                add(node.name, _defaults(node))
            if isinstance(node, ast.ClassDef):
                inits = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
                add(node.name, _defaults(inits[0]) if inits else _fields(node))
    return found


def _defaults(function: ast.FunctionDef) -> frozenset[str]:
    arguments = function.args
    some = [*arguments.posonlyargs, *arguments.args]
    names = {argument.arg for argument in some[len(some) - len(arguments.defaults) :]}
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return frozenset(names | {argument.arg for argument, default in keywords if default is not None})


def _fields(of: ast.ClassDef) -> frozenset[str]:
    assigned = (node for node in of.body if isinstance(node, ast.AnnAssign) and node.value is not None)
    return frozenset(node.target.id for node in assigned if isinstance(node.target, ast.Name))
