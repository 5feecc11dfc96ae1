"""The kinds of faults: each function takes a node and yields what may become of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from typing import Any

from mutation.source import Edit, Source

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: (r"\bis\b", "is not"),
    ast.IsNot: (r"\bis\s+not\b", "is"),
    ast.In: (r"\bin\b", "not in"),
    ast.NotIn: (r"\bnot\s+in\b", "in"),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: (r"\+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: (r"\*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
    ast.Pow: (r"\*\*", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: (r"\|", "&"),
    ast.BitXor: (r"\^", "&"),
}
SWAPPED_NAMES = {
    one: other
    for pair in (
        ("min", "max"), ("amin", "amax"), ("minimum", "maximum"), ("any", "all"), ("zeros", "ones"),
        ("zeros_like", "ones_like"), ("floor", "ceil"), ("new_zeros", "new_ones"),
    )
    for one, other in (pair, pair[::-1])
}  # fmt: skip
DROPPED_CALLS = ("detach", "clone", "contiguous")
# keywords of torch's own and Python's functions that have a default which is another one
DROPPED_KEYWORDS = frozenset(
    {"dim", "keepdim", "dtype", "stable", "descending", "min", "max", "rounding_mode", "enabled", "key", "default"}
    | {"reverse", "initial", "dropout_p", "need_weights", "is_causal", "attn_mask", "scale", "create_graph"}
)
NEED_DIM = frozenset({"softmax", "log_softmax", "logsumexp", "cumsum", "sort_values"})
# what they say changes no result, or nothing that could be seen on a CPU
UNTOUCHED_KEYWORDS = frozenset({"strict", "repr", "stacklevel", "non_blocking", "device", "output_size", "tags"})
_NUMBERS = re.compile(r"(?:.*_)?(?:p|scale|factor|share|kappa|mu|strength|temperature|weight)")
_WIDE = 32  # bits: what is shifted by more is a word or a mask
_NARROWER = 40


def compare(source: Source, node: ast.Compare, _: Any) -> Iterator[Edit | None]:
    sides = [node.left, *node.comparators]
    for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
        token, other = COMPARISONS[type(operator)]
        yield source.replace_between("compare", left, right, token, other)


def arithmetic(source: Source, node: ast.BinOp, _: Any) -> Iterator[Edit | None]:
    if type(node.op) not in ARITHMETIC or _is_text(node.left) or _is_type(node):
        return
    token, other = ARITHMETIC[type(node.op)]
    yield source.replace_between("arithmetic", node.left, node.right, token, other)
    for side in (node.left, node.right):
        yield from scaled(source, side)


def augmented(source: Source, node: ast.AugAssign, _: Any) -> Iterator[Edit | None]:
    token, other = ARITHMETIC[type(node.op)]
    start, end = source.span(node.target)[1], source.span(node.value)[0]
    yield source.replace_token("arithmetic", start, end, token + "=", other + "=")


def shift_width(source: Source, node: ast.BinOp, _: Any) -> Iterator[Edit | None]:
    """`1 << 63` and `2**63` become 40 bits narrower."""
    if isinstance(node.op, (ast.LShift, ast.Pow)) and isinstance(node.right, ast.Constant):
        bits = node.right.value
        if isinstance(bits, int) and bits > max(_WIDE, _NARROWER):
            yield source.replace("narrow", node.right, str(bits - _NARROWER))


def constant(source: Source, node: ast.Constant, _: Any) -> Iterator[Edit | None]:
    value = node.value
    if isinstance(value, bool):
        yield source.replace("boolean", node, str(not value))
    elif isinstance(value, int):
        yield source.replace("integer+1", node, str(value + 1))
        yield source.replace("integer-1", node, str(value - 1) if value > 0 else f"({value - 1})")
    elif isinstance(value, float):
        yield source.replace("float", node, repr(round(value * 1.1, 12)) if value else "0.1")


def boolean(source: Source, node: ast.BoolOp, _: Any) -> Iterator[Edit | None]:
    token, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
    for left, right in zip(node.values, node.values[1:], strict=False):
        yield source.replace_between("and-or", left, right, rf"\b{token}\b", other)


def unary(source: Source, node: ast.UnaryOp, _: Any) -> Iterator[Edit | None]:
    start, end = source.span(node)[0], source.span(node.operand)[0]
    if isinstance(node.op, ast.Not):
        yield source.replace_token("not", start, end, r"\bnot\b", "")
    elif isinstance(node.op, ast.USub):
        yield source.replace_token("minus", start, end, "-", "+")
    elif isinstance(node.op, ast.Invert):
        yield source.replace_token("invert", start, end, "~", "")


def condition(source: Source, node: ast.If | ast.IfExp | ast.While, _: Any) -> Iterator[Edit | None]:
    if not isinstance(node.test, ast.Constant):
        yield from _always(source, node.test, forever=isinstance(node, ast.While))


def filters(source: Source, node: ast.comprehension, _: Any) -> Iterator[Edit | None]:
    for test in node.ifs:
        yield from _always(source, test)


def _always(source: Source, test: ast.expr, forever: bool = False) -> Iterator[Edit]:
    if not forever:  # a loop without end says nothing
        yield source.replace("if-true", test, "True")
    yield source.replace("if-false", test, "False")


def returned(source: Source, node: ast.Return, function: ast.FunctionDef | None) -> Iterator[Edit | None]:
    """What is returned becomes another value of the annotated type."""
    if node.value is None or isinstance(node.value, ast.Constant) or function is None or function.returns is None:
        return
    annotation, text = ast.unparse(function.returns), source.text_of(node.value)
    if annotation.endswith("| None") and not isinstance(node.value, ast.Tuple):
        yield source.replace("return", node.value, "None")
    elif annotation == "bool" or annotation.startswith("Bool["):
        yield source.replace("return", node.value, f"(not ({text}))" if annotation == "bool" else f"(~({text}))")
    elif annotation in ("int", "Tensor") or annotation.startswith(("Int[", "Shaped[")):
        yield source.replace("return", node.value, f"(({text}) + 1)")
    elif annotation == "float" or annotation.startswith("Float["):
        yield source.replace("return", node.value, f"(({text}) * 1.1)")


def call(source: Source, node: ast.Call, _: Any) -> Iterator[Edit | None]:
    yield from _swap_name(source, node)
    yield from _drop_call(source, node)
    yield from _drop_keywords(source, node)
    if name_of(node.func) == "where" and len(node.args) == 3:
        (start, first), (second, end) = (source.span(side) for side in node.args[1:])
        text = source.text(second, end) + source.text(first, second) + source.text(start, first)
        yield Edit("where", start, end, text, start)
    for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
        yield from scaled(source, argument)


def _swap_name(source: Source, node: ast.Call) -> Iterator[Edit]:
    """`min` and `max`, `any` and `all` and the like, also as keywords of `clamp`."""
    name, end = name_of(node.func), source.span(node.func)[1]
    if name in SWAPPED_NAMES:
        yield Edit("name", end - len(name), end, SWAPPED_NAMES[name], end - len(name))
    for keyword in node.keywords if name == "clamp" else ():
        start = source.span(keyword)[0]
        if keyword.arg in SWAPPED_NAMES:
            yield Edit("name", start, start + len(keyword.arg), SWAPPED_NAMES[keyword.arg], start)


def _drop_call(source: Source, node: ast.Call) -> Iterator[Edit]:
    """`x.detach()` becomes `x`, and `x.to(dtype)` too."""
    if not isinstance(node.func, ast.Attribute):
        return
    name, text, at = node.func.attr, source.text_of(node.func.value), source.span(node.func)[1] - len(node.func.attr)
    text = text if isinstance(node.func.value, (ast.Name, ast.Attribute, ast.Call)) else f"({text})"
    if name in DROPPED_CALLS and not node.args:
        yield source.replace(f"drop-{name}", node, text, at)
    if name == "to" and len(node.args) == 1 and name_of(node.args[0]) in ("dtype", "float32", "float64"):
        yield source.replace("drop-to", node, text, at)


def _drop_keywords(source: Source, node: ast.Call) -> Iterator[Edit]:
    """A keyword that has a default is left out."""
    name = name_of(node.func)
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in UNTOUCHED_KEYWORDS:
            continue
        if keyword.arg not in source.signatures.get(name, DROPPED_KEYWORDS) or (
            keyword.arg == "dim" and name in NEED_DIM
        ):
            continue
        start, end = source.span(keyword)
        after = re.match(rb"\s*,[^\S\n]*", source.data[end:])
        if after:
            place = start, end + after.end()
        else:
            before = re.search(rb",\s*\Z", source.data[:start])
            place = (before.start() if before else start), end
        text = "\n" * source.text(*place).count("\n")
        yield Edit("keyword", *place, text, start)


def scaled(source: Source, node: ast.expr) -> Iterator[Edit]:
    """A probability, a scale or a factor is ten per cent lower."""
    if isinstance(node, (ast.Name, ast.Attribute)) and _NUMBERS.fullmatch(name_of(node)):
        text = source.text_of(node)
        yield source.replace("scaled", node, f"({text} if {text} is None else 0.9 * {text})")


def bounds(source: Source, node: ast.Slice, _: Any) -> Iterator[Edit | None]:
    for bound in (node.lower, node.upper):
        if bound is not None and not isinstance(bound, (ast.Constant, ast.UnaryOp)):  # a number's mutants are these
            text = source.text_of(bound)
            yield source.replace("slice+1", bound, f"(({text}) + 1)")
            yield source.replace("slice-1", bound, f"(({text}) - 1)")


def statement(source: Source, node: ast.Expr, _: Any) -> Iterator[Edit | None]:
    if isinstance(node.value, ast.Call):
        yield source.replace("delete", node, "pass")


def jump(source: Source, node: ast.Break | ast.Continue, _: Any) -> Iterator[Edit | None]:
    yield source.replace("jump", node, "continue" if isinstance(node, ast.Break) else "break")


OPERATORS: dict[type[ast.AST], tuple[Callable[[Source, Any, ast.FunctionDef | None], Iterator[Edit | None]], ...]] = {
    ast.Compare: (compare,),
    ast.BinOp: (arithmetic, shift_width),
    ast.AugAssign: (augmented,),
    ast.Constant: (constant,),
    ast.BoolOp: (boolean,),
    ast.UnaryOp: (unary,),
    ast.If: (condition,),
    ast.IfExp: (condition,),
    ast.While: (condition,),
    ast.comprehension: (filters,),
    ast.Return: (returned,),
    ast.Call: (call,),
    ast.Slice: (bounds,),
    ast.Expr: (statement,),
    ast.Break: (jump,),
    ast.Continue: (jump,),
}


def name_of(node: ast.expr) -> str:
    """The last name of `a.b.name`; empty if there is none."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))


def _is_type(node: ast.expr) -> bool:
    """Whether it looks like a union of types."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitOr) and (_is_type(node.left) or _is_type(node.right))
    if isinstance(node, ast.Subscript):
        return _is_type(node.value)
    return (isinstance(node, ast.Constant) and node.value is None) or name_of(node)[:1].isupper()
