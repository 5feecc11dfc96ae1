"""Whether the tokens that ask are the tokens that are asked: row i of query and key must be one token.

Equal lengths do not prove it. What is known of a module before it is called is its name, and how the code around it
calls it; what is known of a call are the tensors themselves.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from torch import nn

from randbatch._errors import InvalidValue
from randbatch.conversion.swap import bare_class

__all__ = ["Other", "is_cross_by_name", "other_tokens", "reads_last_row", "refuse_other_tokens", "why_not_itself"]

_CROSS = re.compile(r"cross_?att|encoder_att(n|ention)$|enc_?dec", flags=re.IGNORECASE)
_OTHERS = {
    "context",
    "context_hidden_states",
    "cross_attention_states",
    "encoder_hidden_states",
    "k",
    "key",
    "key_hidden_states",
    "key_states",
    "key_tensor",
    "key_value_states",
    "keys",
    "kv",
    "mem",
    "memory",
    "merged_attention_mask",
    "shared_kv_states",
}
Forward = ast.FunctionDef | ast.AsyncFunctionDef


def is_cross_by_name(module: nn.Module, ancestors: tuple[nn.Module, ...]) -> bool:
    """Whether the class of the module or its parent, or a name on the way to it, speaks of cross-attention."""
    kinds = [bare_class(kind).__name__ for kind in (module, *ancestors[-1:])]
    around = (*ancestors, module)
    names = [_name_in(outer, inner) for outer, inner in pairwise(around)]
    return any(_CROSS.search(name) is not None for name in (*kinds, *filter(None, names)))


def _name_in(outer: nn.Module, inner: nn.Module) -> str | None:
    return next((name for name, child in outer.named_children() if child is inner), None)


@dataclass(frozen=True)
class Other:
    """A parameter of a forward that may bring other tokens than its first.

    Attributes:
        name: of the parameter.
        position: among the arguments.
        must: whether it has no default.
    """

    name: str
    position: int
    must: bool


@cache
def other_tokens(kind: type[nn.Module]) -> tuple[Other, ...]:
    """The parameters of a forward that bring other tokens than its first.

    A class that calls itself self-attention (with keys of its own, as MobileBert's) has none.
    """
    if re.search("selfatt", kind.__name__, flags=re.IGNORECASE):
        return ()
    parameters = list(inspect.signature(inspect.unwrap(kind.forward)).parameters.values())[1:]
    return tuple(
        Other(parameter.name, position, parameter.default is parameter.empty)
        for position, parameter in enumerate(parameters)
        if position > 0 and parameter.name in _OTHERS
    )


def refuse_other_tokens(
    kind: type[nn.Module], others: tuple[Other, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse a call that gives a module tokens to attend to which are not those that ask.

    Raises:
        ValueError: it does.
    """
    for other in others:
        given = args[other.position] if other.position < len(args) else kwargs.get(other.name)
        first = args[0] if args else next(iter(kwargs.values()), None)
        if given is not None and given is not first:
            raise InvalidValue(
                f"{other.name} of {kind.__name__} must be left out: random batches are for self-attention, where a "
                "token attends to others of its own set; leave this module out with `where`"
            )


@cache
def reads_last_row(kind: type[nn.Module]) -> bool:
    """Whether a forward that takes a mask picks the last row of hidden states, `states[:, -1]`; it may be padding."""
    forward = _forward_of(kind)
    if forward is None or "attention_mask" not in {argument.arg for argument in forward.args.args}:
        return False
    return any(
        isinstance(node, ast.Subscript)
        and re.search(r"(hidden_states?|output|embeds)$", ast.unparse(node.value)) is not None
        and isinstance(node.slice, ast.Tuple)
        and [ast.unparse(index) for index in node.slice.elts[:2]] == [":", "-1"]
        for node in ast.walk(forward)
    )


def why_not_itself(module: nn.Module, ancestors: tuple[nn.Module, ...]) -> str | None:
    """Why the module around it cannot mean self-attention, from how it calls `attention(query, key, ...)`."""
    if not ancestors:
        return None
    outer = ancestors[-1]
    name, kind = _name_in(outer, module), bare_class(outer).__name__
    forward = _forward_of(bare_class(outer))
    for call in () if forward is None or name is None else _calls(forward, name):
        if any(word.arg == "need_weights" and getattr(word.value, "value", None) is True for word in call.keywords):
            return f"{kind} asks it for weights, and those inside a random batch are not those of the whole set"
        pair = [_argument(call, position, word) for position, word in enumerate(("query", "key"))]
        if _are_others(pair[0], pair[1], forward, ancestors):
            return f"it is cross-attention: {kind} gives it queries that are not the tokens it attends to"
    return None


@cache
def _forward_of(kind: type[nn.Module]) -> Forward | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):  # no source, as in a notebook or a frozen program
        return None
    first = tree.body[0]
    return first if isinstance(first, Forward) else None


def _calls(forward: Forward, name: str) -> Iterator[ast.Call]:
    """Where the forward calls `self.name`."""
    for node in ast.walk(forward):
        if isinstance(node, ast.Call) and _is_own(node.func) and getattr(node.func, "attr", None) == name:
            yield node


def _is_own(node: ast.AST) -> bool:
    """Whether it is `self.something`."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    if position < len(call.args):
        return call.args[position]
    return next((word.value for word in call.keywords if word.arg == name), None)


def _are_others(
    query: ast.expr | None, key: ast.expr | None, forward: Forward | None, ancestors: tuple[nn.Module, ...]
) -> bool:
    """Whether two expressions in the forward of the last of `ancestors` are known to be other tokens."""
    if query is None or key is None or forward is None or ast.dump(query) == ast.dump(key):
        return False
    sources = [_source(side, forward, query.lineno) for side in (query, key)]
    found = {ast.dump(source) for source in sources if source is not None}
    if None in sources or len(found) == 1:
        return False
    if any(source is not None and _is_own(source) for source in sources):
        return True  # seeds or a probe, which the module holds, ask the tokens
    outer, inner = (*(None, None), *ancestors)[-2:]
    around = None if outer is None else _forward_of(bare_class(outer))
    name = None if outer is None or inner is None else _name_in(outer, inner)
    if around is None or name is None:
        return True  # two arguments
    words = [argument.arg for argument in forward.args.args[1:]]
    inputs = [source.id for source in sources if isinstance(source, ast.Name)]
    pairs = [[_argument(call, words.index(word), word) for word in inputs] for call in _calls(around, name)]
    return not pairs or any(_are_others(pair[0], pair[1], around, ancestors[:-1]) for pair in pairs)


def _source(node: ast.expr, forward: Forward, line: int) -> ast.expr | None:
    """What an expression at a line comes from: an argument of the forward, or something that the module holds."""
    if isinstance(node, ast.Name):
        return _source_of_name(node, forward, line)
    if _is_own(node):
        return node
    if isinstance(node, ast.Attribute | ast.Subscript):
        return _source(node.value, forward, line)
    if isinstance(node, ast.BinOp):
        sides = [_source(side, forward, line) for side in (node.left, node.right)]
        sides = [side for side in sides if side is not None]
        return next((side for side in sides if isinstance(side, ast.Name)), sides[0] if sides else None)
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute) and not _is_own(function):
            inside = _source(function.value, forward, line)  # tensor.expand(...)
            if inside is not None:
                return inside
        return _source(node.args[0], forward, line) if node.args else None  # module(x), F.relu(x)
    return None


def _source_of_name(node: ast.Name, forward: Forward, line: int) -> ast.expr | None:
    stored = (inner for inner in ast.walk(forward) if isinstance(inner, ast.Name) and inner.id == node.id)
    lines = [inner.lineno for inner in stored if isinstance(inner.ctx, ast.Store) and inner.lineno < line]
    if not lines:
        return ast.Name(node.id) if node.id in {argument.arg for argument in forward.args.args[1:]} else None
    for statement in forward.body:
        if statement.lineno == max(lines) and isinstance(statement, ast.Assign):
            plain = all(isinstance(target, ast.Name) for target in statement.targets)
            return _source(statement.value, forward, statement.lineno) if plain else None
    return None  # inside a branch or a loop: not followed
