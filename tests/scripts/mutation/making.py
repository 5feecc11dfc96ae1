"""All mutants of a source file, and a fair sample of many."""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from mutation.operators import OPERATORS, UNTOUCHED_KEYWORDS, name_of
from mutation.source import Edit, Mutant, Source


def mutants_of(source: Source) -> list[Mutant]:
    """Every mutant of the file by line, column and operator; none twice, and none that is no program."""
    made: dict[bytes, Mutant] = {}
    for edit in _edits(source, source.tree, None):
        changed = source.apply(edit)
        ast.parse(changed)
        made.setdefault(changed, source.mutant(edit))
    mutants = sorted(made.values(), key=lambda mutant: (mutant.line, mutant.column, mutant.operator))
    assert len({mutant.name for mutant in mutants}) == len(mutants), f"two mutants of {source.file} have one name"
    return mutants


def _edits(source: Source, node: ast.AST, function: ast.FunctionDef | None) -> Iterator[Edit]:
    if _is_passed_over(node):
        return
    for operator in OPERATORS.get(type(node), ()):
        yield from (edit for edit in operator(source, node, function) if edit is not None)
    inside = node if isinstance(node, ast.FunctionDef) else None if isinstance(node, ast.Lambda) else function
    for child in _children(node):
        yield from _edits(source, child, inside)


def _is_passed_over(node: ast.AST) -> bool:
    """Imports, messages, docstrings, what only type checkers read."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert, ast.Raise, ast.JoinedStr)):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign):
        return any(name_of(target) in ("__all__", "__slots__") for target in node.targets)
    if isinstance(node, ast.If):
        return name_of(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.keyword) and node.arg in UNTOUCHED_KEYWORDS


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Those that run: no annotations, decorators, bases, words of a warning."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        arguments = node.args
        yield from (default for default in (*arguments.defaults, *arguments.kw_defaults) if default is not None)
        yield from node.body
    elif isinstance(node, ast.ClassDef):
        yield from node.body
    elif isinstance(node, ast.AnnAssign):
        yield from [] if node.value is None else [node.value]
    elif not (isinstance(node, ast.Call) and name_of(node.func) == "warn"):
        yield from ast.iter_child_nodes(node)


def sample(mutants: Sequence[Mutant], number: int | None) -> list[Mutant]:
    """About as large a part of every operator in every file; a larger sample holds every smaller one."""
    groups: dict[tuple[str, str], list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        groups[mutant.file, mutant.operator].append(mutant)
    ranked: list[tuple[float, str, Mutant]] = []
    for members in groups.values():
        mixed = sorted((hashlib.sha256(member.name.encode()).hexdigest(), member) for member in members)
        ranked += [(rank / len(mixed), digest, member) for rank, (digest, member) in enumerate(mixed)]
    ranked.sort(key=lambda each: each[:2])
    chosen = {member.name for _, _, member in ranked[:number]}
    return [mutant for mutant in mutants if mutant.name in chosen]
