"""What a function depends on beside its arguments, read from the graph that autograd records of it.

A function that is computed again in backward, a few rows at a time, is called with rows that are cut off from the rest
of the graph. It may read any other tensor: parameters, weights that a hypernetwork made, a cached parametrization. The
graph of one call ends in all of these, so none of their gradients is lost without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Closure"]

Edge = tuple[Any, int]
"""A node of the graph, and which of its outputs."""

_Leaf: Any = type(torch.zeros((), requires_grad=True).view(1).grad_fn.next_functions[0][0])  # type: ignore[union-attr]

_INSTEAD = "set chunk_batches to None there"
_AMBIGUOUS = (
    f"chunk_batches cannot tell apart the gradients of a tensor and of another that was computed from it: {_INSTEAD}"
)


class Closure:
    """The tensors, beside its rows, by which a function is to be differentiated.

    Args:
        owner: the module that the function belongs to, whose parameters are among these tensors. Default: none.

    Attributes:
        tensors: found by `find`; leaves, and tensors of the owner that were computed before the function was called.
    """

    def __init__(self, owner: nn.Module | None = None) -> None:
        self._owner = owner
        self._edges: set[Edge] = set()
        self._origins: set[int] = set()  # leaves that older tensors were computed from
        self.tensors: list[Tensor] = []

    def prepare(self) -> None:
        """Inside `parametrize.cached`, compute what it keeps now, and not in the graph of one of the calls."""
        if self._owner is None or not getattr(parametrize, "_cache_enabled", 0):
            return
        for module in self._owner.modules():
            for name in getattr(module, "parametrizations", ()):
                getattr(module, name)

    def find(self, outs: Sequence[Tensor], rows: Sequence[Tensor], mark: int) -> None:
        """Read `tensors` from the graph of a first call; nodes older than `mark` were there before it.

        Raises:
            RuntimeError: a tensor cannot be found in the owner, or is computed from another of these tensors.
        """
        leaves = {id(x): x for x in self._parameters()}
        older: dict[Edge, Tensor] = {}
        for edge in _ends(outs, mark, frozenset()):
            leaf = getattr(edge[0], "variable", None)
            if leaf is None:
                older[edge] = self._tensor_of(edge)
            elif not any(leaf is row for row in rows):
                leaves[id(leaf)] = leaf
        self.tensors = [*leaves.values(), *older.values()]
        self._edges = set(older)
        above = [end for x in older.values() for end in _all_above(x)]
        if any(edge in older for edge in above):
            raise RuntimeError(_AMBIGUOUS)
        self._origins = {id(getattr(node, "variable", None)) for node, _ in above}
        self.used(outs, rows)

    def used(self, outs: Sequence[Tensor], rows: Sequence[Tensor]) -> list[bool]:
        """By which of `tensors` the outputs of a call are to be differentiated.

        Where an older tensor is read, autograd itself goes on from it to the leaves that it was computed from.

        Raises:
            RuntimeError: it reads another tensor than the first call did, whose gradient would be lost, or both an
                older tensor and what that was computed from.
        """
        known = {id(x) for x in (*self.tensors, *rows)}
        reads_older = reads_origin = False
        for edge in _ends(outs, None, self._edges):
            reads_older = reads_older or edge in self._edges
            leaf = edge[0].variable if type(edge[0]) is _Leaf else None
            reads_origin = reads_origin or (leaf is not None and id(leaf) in self._origins)
            if leaf is not None and id(leaf) not in known:
                raise RuntimeError(
                    "chunk_batches computes a module again in backward, but its parameters are others by now (by "
                    f"torch.func.functional_call, or a change of the module?): {_INSTEAD}"
                )
        if reads_older and reads_origin:
            raise RuntimeError(_AMBIGUOUS)
        return [not (reads_older and id(x) in self._origins) for x in self.tensors]

    def _parameters(self) -> list[Tensor]:
        return [] if self._owner is None else [x for x in self._owner.parameters() if x.requires_grad]

    def _tensor_of(self, edge: Edge) -> Tensor:
        for tensor in self._held():
            if tensor.grad_fn is edge[0] and tensor.output_nr == edge[1]:
                return tensor
        raise RuntimeError(
            f"chunk_batches cannot differentiate by a tensor that {edge[0].name()} computed before, and that no "
            f"attribute of the module holds: {_INSTEAD}"
        )

    def _held(self) -> Iterator[Tensor]:
        """Tensors of the owner that are not leaves, and those that `parametrize.cached` keeps."""
        cache: Any = getattr(parametrize, "_cache", {})
        for holder in (*(vars(m) for m in (self._owner.modules() if self._owner else ())), cache):
            yield from (x for x in holder.values() if isinstance(x, Tensor) and x.grad_fn is not None)


def mark() -> int:
    """The age of a node that autograd would record now, in this thread."""
    with torch.enable_grad():
        node: Any = torch.empty((), requires_grad=True).view(1).grad_fn
    return node._sequence_nr()


def _ends(outs: Sequence[Tensor], older_than: int | None, stops: set[Edge] | frozenset[Edge]) -> Iterator[Edge]:
    """Where the graph of `outs` ends: in leaves, in nodes older than a mark, at the stops."""
    todo: list[Edge] = [(x.grad_fn, x.output_nr) for x in outs if x.grad_fn is not None]
    seen = set(todo)
    while todo:
        edge = todo.pop()
        node = edge[0]
        if type(node) is _Leaf or edge in stops or (older_than is not None and node._sequence_nr() < older_than):
            yield edge
            continue
        for above in node.next_functions:
            if above[0] is not None and above not in seen:
                seen.add(above)
                todo.append(above)


def _all_above(x: Tensor) -> Iterator[Edge]:
    """Every edge that `x` was computed from."""
    node: Any = x.grad_fn
    todo, seen = [node], {node}
    while todo:
        for edge in todo.pop().next_functions:
            if edge[0] is not None:
                yield edge
                if edge[0] not in seen:
                    seen.add(edge[0])
                    todo.append(edge[0])
