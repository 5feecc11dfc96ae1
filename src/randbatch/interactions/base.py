"""What an interaction is: what a token does with those it meets in its random batch.

Shape letters: N tokens, M batches of one size, P slots, G sets (graphs), H heads, D head size, E size of a value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import count
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from randbatch._errors import InvalidValue
from randbatch._shapes import Bool, Float, Int, Shaped
from randbatch._table import Table
from randbatch.interactions.merge import Partial, log_kappa
from randbatch.interactions.options import Options
from randbatch.kernels import AUTO, Backend
from randbatch.partition import Partition

__all__ = ["Block", "Debias", "Interaction", "Kind", "Sets", "is_zero", "log_weight", "not_self", "object_of_key"]

Debias = float | Tensor
"""δ: one number, one per head `[H]`, or one per set and head `[G, H]`."""


class Kind(Enum):
    """The form of an interaction, which decides how rounds are merged and what an estimator can do with it.

    Attributes:
        SUM: `Σ_j f_ij v_j`.
        RATIO: `Σ_j w_ij v_j / (c_i + Σ_j w_ij)`, c_i independent of the other tokens.
        TUPLE_RATIO: the same over tuples j, k, ….
        IMPLICIT: the normaliser of a token solves an equation.
        SELECTION: some of the tokens are chosen.
        TWO_AXES: normalised over queries and over keys.
        OUTSIDE: a function of single tokens or of edges.
        FUNCTION: any function of a set, about which nothing else is known.
    """

    SUM = "sum"
    RATIO = "ratio"
    TUPLE_RATIO = "tuple ratio"
    IMPLICIT = "implicit"
    SELECTION = "selection"
    TWO_AXES = "two axes"
    OUTSIDE = "outside"
    FUNCTION = "function"


class Sets:
    """The sets (graphs) that tokens belong to, for statistics over each of them.

    Args:
        number: `[N]`, the set of each token, counted from 0; None where there is one set.
        sizes: `[G]`, how many tokens each set has.
    """

    def __init__(self, number: Int[Tensor, " n"] | None, sizes: Int[Tensor, " g"]) -> None:
        self.number, self.sizes = number, sizes

    @classmethod
    def of(cls, part: Partition) -> Sets:
        """The sets of a partition, for tensors in its token order."""
        if part.set_of_batch is None or part.set_sizes is None:
            return cls(None, torch.full((1,), part.set_size, device=part.order.device))
        return cls(part.unpack(part.spread(part.set_of_batch)), part.set_sizes)

    def sum(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "g ..."]:
        """The sum over the tokens of each set."""
        if self.number is None:
            return x.sum(dim=0, keepdim=True)
        return x.new_zeros(len(self.sizes), *x.shape[1:]).index_add(0, self.number, x)

    def mean(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "g ..."]:
        """The mean over the tokens of each set."""
        return self.sum(x) / self.sizes.reshape(-1, *(1,) * (x.dim() - 1)).to(x.dtype)


class Block:
    """Batches of one size, and what is known of them beside their projected tokens.

    Args:
        options: how to compute.
        sizes: `[G]`, how many tokens each set has.
        sets: `[M]`, the set of each batch; None where there is one set.
        statistics: `[G, …]` each, what `Interaction.measure` returned.
    """

    __slots__ = ("_sets", "_sizes", "_statistics", "options")

    def __init__(
        self, options: Options, sizes: Tensor, sets: Tensor | None = None, statistics: Sequence[Tensor] = ()
    ) -> None:
        self.options, self._sizes, self._sets, self._statistics = options, sizes, sets, statistics

    @property
    def set_sizes(self) -> Int[Tensor, "_m 1 1 1"]:
        """How many tokens the set of each batch has, `[M, 1, 1, 1]`; `[1, 1, 1, 1]` where there is one set."""
        return self._of_batch(self._sizes)[:, None, None, None]

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        """The statistics of the set of each batch, `[M, …]` each; `[1, …]` where there is one set."""
        return tuple(map(self._of_batch, self._statistics))

    def _of_batch(self, x: Shaped[Tensor, "g ..."]) -> Shaped[Tensor, "_m ..."]:
        return x if self._sets is None else x.index_select(0, self._sets)


_keys = count()
_objects: WeakValueDictionary[str, Any] = WeakValueDictionary()


def object_of_key(key: str) -> Any:
    """The interaction or estimator that has a key."""
    return _objects[key]


def _entry(table: Table[Any], name: str) -> Any:
    return table.resolve(name)


class Keyed:
    """Objects with a key of their own, by which an operator that takes no objects finds them in this process.

    Attributes:
        key: of the object.
        name: how messages call it, and the table.
        table: the table that holds such objects.
    """

    key: str
    name: ClassVar[str] = ""
    table: ClassVar[Table[Any] | None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        object.__setattr__(made, "key", str(next(_keys)))
        _objects[made.key] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "key"}  # a copy has its own

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An entry of a table is pickled by its name, so that it is the entry again."""
        table = type(self).table
        if table is not None and table.get(self.name) is self:
            return _entry, (table, self.name)
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Itself: it does not change. A module is copied, with its parameters."""
        if not isinstance(self, nn.Module):
            return self
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return made


class Interaction(Keyed):
    """What a token does with those it meets in its batch.

    A subclass declares its kind and defines `attend` for a block of batches. A sum over pairs of tokens also defines
    `partial` and `own`; then several rounds, the estimator `debiased`, chunks and every derivative come for free
    (`randbatch.interactions.Pairwise` derives all three from the weight of a pair). An interaction with parameters is
    an `nn.Module` too; a layer makes it its child.

    Attributes:
        kind: its form.
        projections: the names of the tensors it takes, in order; the layer projects every token to these. The last is
            what an output looks like.
        smallest_batch: the fewest tokens in a batch with which it has a meaning.
        has_scale: whether `scale` means something to it.
        has_dropout: whether there are attention weights to be dropped.
        has_backends: whether `backend` chooses an implementation.
        is_exponential: whether its weights are `exp(scale · query·key)`, so that the attention of a Gaussian cloud is
            known in closed form; the estimator `corrected` and `tolerance` rest on it.
        can_trace: whether `torch.compile` can look into one round of one set.
        is_closed: whether it holds a function that no operator of torch can name.
        statistics: names of what `measure` computes over each whole set, before tokens are split into batches.
    """

    kind: ClassVar[Kind]
    projections: ClassVar[tuple[str, ...]] = ("query", "key", "value")
    smallest_batch: ClassVar[int] = 2
    has_scale: ClassVar[bool] = False
    has_dropout: ClassVar[bool] = False
    has_backends: ClassVar[bool] = False
    is_exponential: ClassVar[bool] = False
    can_trace: ClassVar[bool] = False
    is_closed: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ()

    def attend(self, block: Block, *projected: Float[Tensor, "m p h _"]) -> Float[Tensor, "m p h e"]:
        """The interaction over all tokens of each batch: its definition."""
        raise NotImplementedError(f"{type(self).__name__} does not define `attend`")

    def partial(self, block: Block, *projected: Float[Tensor, "m p h _"]) -> Partial:
        """What the *other* tokens of its batch contribute to each token."""
        raise NotImplementedError(f"{type(self).__name__} does not define `partial`")

    def own(self, block: Block, *projected: Float[Tensor, "n h _"]) -> Partial:
        """What each token contributes to itself; a batch of the block is one token."""
        raise NotImplementedError(f"{type(self).__name__} does not define `own`")

    def measure(self, sets: Sets, *projected: Float[Tensor, "n h _"]) -> tuple[Shaped[Tensor, "g ..."], ...]:
        """The set statistics, in O(N): a row for each set."""
        return ()

    def elements_per_token(self, width: int, sizes: Sequence[tuple[int, int]], like: Tensor, options: Options) -> int:
        """What backward holds for each token of a batch of `width`, beside projections and output; in elements.

        Args:
            width: tokens in a batch.
            sizes: heads and head size of every projection.
            like: a tensor of the device and the dtype of the projections.
            options: how to compute.
        """
        return 0

    def backends(
        self, like: Tensor, sizes: Sequence[tuple[int, int]], options: Options, *, merged: bool
    ) -> Iterator[tuple[Backend, str | None]]:
        """The backends that are tried for projections of these sizes, with the reason why each cannot run.

        Args:
            like: a tensor of the device and the dtype of the projections.
            sizes: heads and head size of every projection.
            options: how to compute.
            merged: whether several rounds are merged.
        """
        return iter(())

    def owner_beside(self, owner: nn.Module | None) -> nn.Module | None:
        """The module whose parameters chunks are differentiated by: the owner of the projections, or itself."""
        return self if owner is None and isinstance(self, nn.Module) else owner

    @property
    def averages(self) -> bool:
        """Whether several rounds are averaged, since there is nothing to merge."""
        return self.kind in (Kind.TWO_AXES, Kind.FUNCTION)

    @property
    def can_merge(self) -> bool:
        """Whether it is a sum over pairs, so that rounds can be merged and a token's own weight be told apart."""
        return self.kind in (Kind.SUM, Kind.RATIO) and type(self).partial is not Interaction.partial

    def check_attention(self) -> None:
        """Refuse an interaction that is not attention where query, key and value are what there is.

        Raises:
            ValueError: it takes other projections.
        """
        if self.projections != Interaction.projections:
            raise InvalidValue(
                f"interaction must take query, key and value here, but {self.name!r} takes "
                f"{', '.join(self.projections)}"
            )

    def check_options(self, options: Options) -> None:
        """Refuse options that mean nothing to this interaction.

        Raises:
            ValueError: one of them is set.
        """
        if options.scale is not None and not self.has_scale:
            raise InvalidValue(
                f"scale must be None with interaction {self.name!r}, which has no logits; got {options.scale}"
            )
        if options.dropout_p and not self.has_dropout:
            raise InvalidValue(
                f"dropout_p must be 0 with interaction {self.name!r}, which has no attention weights to drop; got "
                f"{options.dropout_p}"
            )
        if options.backend != AUTO and not self.has_backends:
            raise InvalidValue(
                f"backend must be 'auto' with interaction {self.name!r}, which has one implementation; got "
                f"{options.backend!r}"
            )

    # What follows runs in the batches of a partition. Tensors are in token order, `[N, H, D]` each.

    def in_batches(
        self,
        part: Partition,
        projected: Sequence[Shaped[Tensor, "n ..."]],
        options: Options,
        debias: Debias = 0.0,
    ) -> Shaped[Tensor, "n ..."]:
        """The interaction in every batch; the weights of the others grow by κ^δ, δ = `debias` (of sets and heads)."""
        blocks = self.blocks(part, projected, options)
        if is_zero(debias):

            def attend(position: int, *block: Tensor) -> tuple[Tensor, ...]:
                return (self.attend(blocks[position], *block),)

            return part.map_blocks(attend, *projected)[0]
        total = self.others(part, projected, options, blocks)
        weight = log_weight(part, part.unpack(part.count_others()), part.unpack(part.count_met()), debias)
        total = total.weigh(weight).merge(self.alone(part, projected, options))
        return total.out.to(projected[-1].dtype)

    def in_full(
        self, whole: Partition, projected: Sequence[Shaped[Tensor, "n ..."]], options: Options
    ) -> Shaped[Tensor, "n ..."]:
        """The interaction over whole sets: every batch of the partition is one."""
        return self.in_batches(whole, projected, options)

    def of_nothing(self, projected: Sequence[Shaped[Tensor, "n ..."]]) -> Shaped[Tensor, "n ..."]:
        """The output where there is no token."""
        return projected[-1].clone()

    def blocks(self, part: Partition, projected: Sequence[Tensor], options: Options) -> list[Block]:
        """What is known of the batches of each size."""
        measured = self.measure(Sets.of(part), *projected) if self.statistics else ()
        if part.set_of_batch is None or part.set_sizes is None:
            sizes = torch.full((1,), part.set_size, device=part.order.device)
            return [Block(options, sizes, None, measured) for _ in part.groups]
        sets = part.set_of_batch.split([rows for rows, _ in part.groups])
        return [Block(options, part.set_sizes, own, measured) for own in sets]

    def others(
        self, part: Partition, projected: Sequence[Tensor], options: Options, blocks: Sequence[Block] | None = None
    ) -> Partial:
        """What each token gets from the others of its batch."""
        blocks = self.blocks(part, projected, options) if blocks is None else blocks

        def compute(position: int, *block: Tensor) -> tuple[Tensor, ...]:
            return _present(self.partial(blocks[position], *block))

        found = part.map_blocks(compute, *projected)
        return Partial(found[0], found[1] if len(found) > 1 else None)

    def others_backward(
        self, part: Partition, projected: Sequence[Tensor], options: Options, grad: Tensor, total: Partial
    ) -> tuple[Tensor, ...] | None:
        """The gradients of the projections, for a faster way than autograd; None where there is none.

        `total` is a sum over more tokens than the batch has, of which `grad` is the gradient.
        """
        return None

    def alone(self, part: Partition, projected: Sequence[Tensor], options: Options) -> Partial:
        """What each token gets from itself; it depends on the sets of the partition only."""
        sets = Sets.of(part)
        measured = self.measure(sets, *projected) if self.statistics else ()
        return self.own(Block(options, sets.sizes, sets.number, measured), *projected)


def log_weight(
    part: Partition, others: Int[Tensor, " n"], met: Int[Tensor, " n"], debias: Debias
) -> Float[Tensor, "n _h"]:
    """`δ log κ` of every token, `[N, 1]` or `[N, H]`, for tokens that met so many of their others."""
    if isinstance(debias, Tensor) and debias.dim() == 2:
        debias = debias if part.set_of_batch is None else part.unpack(part.spread(debias[part.set_of_batch]))
    return debias * log_kappa(others, met).unsqueeze(1)


def is_zero(debias: Debias) -> bool:
    """Whether nothing is to be debiased."""
    return not isinstance(debias, Tensor) and not debias


def _present(partial: Partial) -> tuple[Tensor, ...]:
    return (partial.out,) if partial.log_norm is None else (partial.out, partial.log_norm)


def not_self(width: int, device: torch.device) -> Bool[Tensor, "p 1 p"]:
    """False where query and key are one token; broadcasts against `[M, P, H, P]`."""
    return ~torch.eye(width, dtype=torch.bool, device=device).unsqueeze(1)
