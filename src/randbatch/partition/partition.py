"""Random partitions of N tokens into batches of about p, and the moves between token order and batch order.

A partition is a function of `(num_tokens, batch_size, batch, seed)` alone: it is the same on every device, under
every thread count and on every rank. What a set (graph) gets depends on its size and the seed, not on its neighbours.
It is stored as a permutation and the batch sizes; since the permutation is a
bijection, the backward of a gather is again a gather (no sort, no atomics).

Shape letters: N tokens, M batches, P slots per batch (the largest batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._rows import permute
from randbatch._shapes import Bool, Int, Shaped
from randbatch.partition.check import check_partition

__all__ = ["Partition", "Partitions"]


class Partitions:
    """One or several partitions of the same tokens, a round each, iterated as often as is wanted."""

    num_tokens: int
    """N."""

    @property
    def first(self) -> Partition:
        """The first round."""
        return next(iter(self))

    @property
    def only(self) -> Partition | None:
        """The partition, if there is one round."""
        return None

    def __iter__(self) -> Iterator[Partition]:
        raise NotImplementedError

    def independent(self) -> Iterator[Partition]:
        """As many partitions, drawn independently, each in batches of p."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Partition(Partitions):
    """N tokens in M random batches of at most P tokens.

    Batch order lists the tokens batch after batch, the largest batches first. A single set has batches of at most two
    sizes that differ by one, so `groups` has at most two entries; batches of equal size are one rectangle without
    padding, and no token is ever computed in vain.

    Args:
        order: int64 `[N]`, the token at each position of batch order; a permutation of 0 … N−1.
        groups: `((rows, width), …)`, widths descending: how many batches there are of each size.
        set_of_batch: int64 `[M]`, the set (graph) that each batch is of; None if there is one set.
        set_sizes: int64 `[G]`, the number of tokens of each set; None if there is one set.
        in_order: whether tokens already stand in batch order, so that nothing has to be moved.
        part_of: the partition of which these are some of the batches; None if they are all.
        is_checked: leave it at False, and all of this is checked, once, in O(N) time: kernels trust a partition.

    Raises:
        TypeError: `order`, `set_of_batch` or `set_sizes` is not int64, or `groups` are not pairs of ints.
        ValueError: `order` is no permutation, or sizes do not add up.

    Example:
        >>> from randbatch.partition import random_partition
        >>> part = random_partition(5, 2)
        >>> part.index.shape, part.mask.tolist()
        (torch.Size([3, 2]), [[True, True], [True, True], [True, False]])
        >>> x = torch.arange(5.0)
        >>> torch.equal(part.scatter(part.gather(x)), x)
        True
    """

    order: Int[Tensor, " n"]
    groups: tuple[tuple[int, int], ...]
    set_of_batch: Int[Tensor, " m"] | None = None
    set_sizes: Int[Tensor, " g"] | None = None
    in_order: bool = False
    part_of: Partition | None = None
    is_checked: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not self.is_checked:
            check_partition(self.order, self.groups, self.set_of_batch, self.set_sizes, self.in_order)
            for name in ("order", "set_of_batch", "set_sizes"):
                tensor = getattr(self, name)
                if isinstance(tensor, Tensor) and tensor.is_inference():  # training may be next to want it
                    with torch.inference_mode(False):
                        object.__setattr__(self, name, tensor.clone())

    def __iter__(self) -> Iterator[Partition]:
        """One round: itself."""
        yield self

    @property
    def first(self) -> Partition:
        """Itself: it is one round."""
        return self

    @property
    def only(self) -> Partition:
        """Itself: it is one round."""
        return self

    def independent(self) -> Iterator[Partition]:
        """One round: itself."""
        yield self

    @property
    def num_tokens(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """N."""
        return self.order.shape[0]

    @property
    def num_batches(self) -> int:
        """M."""
        return sum([rows for rows, _ in self.groups])

    @property
    def is_whole(self) -> bool:
        """Whether every set is one batch, so that attention inside batches is full attention."""
        whole = self.part_of or self
        return whole.num_batches <= (1 if whole.set_sizes is None else whole.set_sizes.numel())

    @property
    def set_size(self) -> int:
        """The size of the set, where there is one: N, unless these are some of its batches only."""
        return (self.part_of or self).num_tokens

    @property
    def num_slots(self) -> int:
        """P, the size of the largest batch."""
        return self.groups[0][1] if self.groups else 0

    @cached_property
    def inverse(self) -> Int[Tensor, " n"]:
        """int64 `[N]`: the position of each token in batch order."""
        with torch.inference_mode(False):  # it stays, and training may be next to want it
            return self._invert()

    def _invert(self) -> Tensor:
        positions = torch.arange(self.num_tokens, device=self.order.device)
        return torch.empty_like(self.order).index_copy_(0, self.order, positions)

    @cached_property
    def index(self) -> Int[Tensor, "m p"]:
        """int64 `[M, P]`: the token in each slot. A masked slot repeats the last token of its own batch."""
        rows = [
            torch.cat([block, block[:, -1:].expand(-1, self.num_slots - block.shape[1])], dim=1)
            for block in self.split(self.order)
        ]
        return torch.cat(rows) if rows else self.order.new_empty(0, 0)

    @cached_property
    def mask(self) -> Bool[Tensor, "m p"] | None:
        """Bool `[M, P]`, True where the slot holds a token of its own; None where every slot does."""
        if len(self.groups) <= 1:
            return None
        device = self.order.device
        slots = torch.arange(self.num_slots, device=device)
        return torch.cat([(slots < width).expand(rows, -1) for rows, width in self.groups])

    def pack(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Token order `[N, …]` to batch order `[N, …]`."""
        return x if self.in_order else permute(x, self.order, self._traced_inverse())

    def unpack(self, packed: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
        """Batch order `[N, …]` to token order `[N, …]`."""
        return packed if self.in_order else permute(packed, self._traced_inverse(), self.order)

    def _traced_inverse(self) -> Tensor:
        # a cached property holds a lock, which `torch.compile` does not trace; it finds equal results by itself
        return self._invert() if torch.compiler.is_compiling() else self.inverse

    def split(self, packed: Shaped[Tensor, "n ..."]) -> list[Tensor]:
        """Cut batch order `[N, …]` into one view `[rows, width, …]` per batch size: whole batches, no padding."""
        pieces = packed.split([rows * width for rows, width in self.groups])
        return [piece.unflatten(0, shape) for piece, shape in zip(pieces, self.groups, strict=True)]

    def join(self, blocks: Sequence[Tensor]) -> Tensor:
        """Put the blocks `[rows, width, …]` of `split` together again, `[N, …]` in batch order. M must be > 0."""
        flat = [block.flatten(0, 1) for block in blocks]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def map_blocks(
        self, function: Callable[..., tuple[Tensor, ...]], *tensors: Shaped[Tensor, "n ..."]
    ) -> tuple[Shaped[Tensor, "n ..."], ...]:
        """`function(position, *blocks)` of the blocks `[rows, width, …]` of every size; its results in token order.

        The position is that of the size in `groups`, which must not be empty.
        """
        blocks = zip(*(self.split(self.pack(tensor)) for tensor in tensors), strict=True)
        results = [function(position, *block) for position, block in enumerate(blocks)]
        return tuple(self.unpack(self.join(pieces)) for pieces in zip(*results, strict=True))

    def packed(self) -> Partition:
        """The same batches for tokens that stand in batch order: `packed().pack(x)` is `x`."""
        positions = torch.arange(self.num_tokens, device=self.order.device)
        return replace(self, order=positions, in_order=True, is_checked=True)

    def chunks(self, num_batches: int) -> Iterator[tuple[Int[Tensor, " n"], Partition]]:
        """At most `num_batches` batches at a time: their tokens, and the partition of these tokens in that order."""
        whole = self.part_of or self
        start, piece = 0, None
        for first in range(0, self.num_batches, num_batches):
            rows = slice(first, first + num_batches)
            groups = _some_groups(self.groups, rows.start, rows.stop)
            num_tokens = sum(rows * width for rows, width in groups)
            if piece is None or groups != piece.groups or self.set_of_batch is not None:  # most are the same
                positions = torch.arange(num_tokens, device=self.order.device)
                sets = None if self.set_of_batch is None else self.set_of_batch[rows]
                piece = Partition(positions, groups, sets, self.set_sizes, True, whole, is_checked=True)
            yield self.order[start : start + num_tokens], piece
            start += num_tokens

    def spread(self, values: Shaped[Tensor, "m ..."]) -> Shaped[Tensor, "n ..."]:
        """What belongs to a batch, `[M, …]`, to each of its tokens, `[N, …]` in batch order."""
        pieces = values.split([rows for rows, _ in self.groups])
        return torch.cat(
            [piece.repeat_interleave(width, 0) for piece, (_, width) in zip(pieces, self.groups, strict=True)]
        )

    def starts_and_widths(self) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """Where each batch begins in batch order, and how many tokens it has; int64 `[M]` each."""
        return self._find_starts_and_widths() if torch.compiler.is_compiling() else self._starts_and_widths

    @cached_property
    def _starts_and_widths(self) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):
            return self._find_starts_and_widths()

    def _find_starts_and_widths(self) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or self.num_batches > _REMEMBERED:
            return _starts_and_widths_of(self.groups, self.order.device)
        return _remembered_starts_and_widths(self.groups, self.order.device)

    def count_met(self) -> Int[Tensor, " n"]:
        """The m − 1 others that each token meets in its batch, int64 `[N]` in batch order."""
        return self.spread(self.starts_and_widths()[1] - 1) if self.groups else self.order

    def count_others(self) -> Int[Tensor, " n"]:
        """N − 1, the others in each token's whole set, int64 `[N]` in batch order."""
        if self.set_of_batch is None or self.set_sizes is None:
            return torch.full_like(self.order, self.set_size - 1)
        return self.spread(self.set_sizes[self.set_of_batch]) - 1

    def gather(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m p ..."]:
        """Token order `[N, …]` to slots `[M, P, …]`; masked slots are zero."""
        self._check_rows("x", x, (self.num_tokens,))
        blocks = self.split(self.pack(x))
        if len(blocks) == 1:
            return blocks[0]
        tail = [0, 0] * (x.dim() - 1)
        padded = [F.pad(block, [*tail, 0, self.num_slots - block.shape[1]]) for block in blocks]
        return torch.cat(padded) if padded else x.unflatten(0, (0, 0))

    def scatter(self, y: Shaped[Tensor, "m p ..."]) -> Shaped[Tensor, "n ..."]:
        """Slots `[M, P, …]` to token order `[N, …]`; masked slots are ignored."""
        self._check_rows("y", y, (self.num_batches, self.num_slots))
        if not self.groups:
            return y.flatten(0, 1)
        rows = y.split([rows for rows, _ in self.groups])
        return self.unpack(self.join([row[:, :width] for row, (_, width) in zip(rows, self.groups, strict=True)]))

    def to(self, device: torch.device | str) -> Partition:
        """The same partition on another device."""
        with torch.inference_mode(False):
            moved = {
                name: None if tensor is None else tensor.to(device)
                for name, tensor in (("set_of_batch", self.set_of_batch), ("set_sizes", self.set_sizes))
            }
            return replace(self, order=self.order.to(device), is_checked=True, **moved)

    def _check_rows(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape[: len(shape)] != shape:
            raise ValueError(f"{name} must start with {list(shape)} to fit this partition, got {list(tensor.shape)}")


_REMEMBERED = 4096  # batches of a partition whose starts and widths are remembered: 64 KiB


def _starts_and_widths_of(groups: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([rows for rows, _ in groups], dtype=torch.int64)
    widths = torch.tensor([width for _, width in groups], dtype=torch.int64)
    widths = widths.repeat_interleave(rows, output_size=sum(rows for rows, _ in groups))
    both = torch.stack([widths.cumsum(0) - widths, widths]).to(device, non_blocking=True)
    return both[0], both[1]


# Small calls spend a sixth of their time on these, and the sizes of batches are the same in every call. Nobody writes
# into them.
_remembered_starts_and_widths = lru_cache(maxsize=64)(_starts_and_widths_of)


def _some_groups(groups: tuple[tuple[int, int], ...], first: int, stop: int) -> tuple[tuple[int, int], ...]:
    """The groups of the batches from `first` to before `stop`."""
    some: list[tuple[int, int]] = []
    for rows, width in groups:
        taken = max(0, min(rows, stop) - max(0, first))
        if taken:
            some.append((taken, width))
        first, stop = first - rows, stop - rows
    return tuple(some)
