"""What must hold of a partition before a kernel reads and writes where it says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from randbatch._errors import InvalidType, InvalidValue

__all__ = ["check_partition"]


def check_partition(
    order: object, groups: object, set_of_batch: Tensor | None, set_sizes: Tensor | None, in_order: bool
) -> None:
    """Check that `order` is a permutation, and that batches and sets are cut from it without a rest.

    Raises:
        TypeError: a tensor that is none, or not int64; `groups` that are not pairs of ints.
        ValueError: a shape, a device, a token that is missing, repeated or not there, or sizes that do not add up.
    """
    num_tokens = len(_vector("order", order))
    assert isinstance(order, Tensor)
    num_batches = _check_groups(groups, num_tokens)
    if (set_of_batch is None) != (set_sizes is None):
        raise InvalidValue("set_of_batch and set_sizes must be given together, or neither")
    if torch.compiler.is_compiling() or order.is_meta:
        return  # what follows looks at numbers
    if num_tokens:
        low, high = (int(end) for end in torch.aminmax(order))
        if low < 0 or high >= num_tokens:
            raise InvalidValue(f"order must hold tokens 0 to {num_tokens - 1}, got {low if low < 0 else high}")
        seen = torch.zeros(num_tokens, dtype=torch.bool, device=order.device)
        seen[order] = True
        if not bool(seen.all()):
            missing = int((~seen).nonzero()[0])
            raise InvalidValue(f"order must hold every token once, but {missing} is missing and another is repeated")
    if in_order and not torch.equal(order, torch.arange(num_tokens, device=order.device)):
        raise InvalidValue("in_order must be False where order is not 0, 1, 2, …")
    if set_of_batch is not None and set_sizes is not None:
        _check_sets(order, groups, num_batches, set_of_batch, set_sizes)


def _vector(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidType(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise InvalidType(f"{name} must be int64, got {value.dtype}")
    if value.dim() != 1:
        raise InvalidValue(f"{name} must have one dimension, got {list(value.shape)}")
    return value


def _check_groups(groups: object, num_tokens: int) -> int:
    """Check `((rows, width), …)`; return how many batches there are."""
    pairs: tuple[object, ...] = groups if isinstance(groups, tuple) else ()
    ints = [
        (rows, width)
        for rows, width in (pair for pair in pairs if isinstance(pair, tuple) and len(pair) == 2)  # pyright: ignore[reportUnknownArgumentType]
        if isinstance(rows, int) and isinstance(width, int)
    ]
    if not isinstance(groups, tuple) or len(ints) != len(pairs):
        raise InvalidType(f"groups must be a tuple of (rows, width), two ints each, got {groups!r}")
    widths = [width for _, width in ints]
    descending = all(left > right for left, right in itertools.pairwise(widths))
    if not descending or any(rows < 1 or width < 1 for rows, width in ints):
        raise InvalidValue(f"groups must hold rows >= 1 and widths >= 1, the widest first, got {groups}")
    total = sum(rows * width for rows, width in ints)
    if total != num_tokens:
        raise InvalidValue(f"groups must hold as many tokens as order, {num_tokens}, got {total} in {groups}")
    return sum(rows for rows, _ in ints)


def _check_sets(order: Tensor, groups: object, num_batches: int, set_of_batch: Tensor, set_sizes: Tensor) -> None:
    pairs: Sequence[tuple[int, int]] = groups  # type: ignore[assignment]
    for name, tensor in (("set_of_batch", set_of_batch), ("set_sizes", set_sizes)):
        if _vector(name, tensor).device != order.device:
            raise InvalidValue(f"{name} is on {tensor.device}, order is on {order.device}; both must be on one device")
    if len(set_of_batch) != num_batches:
        raise InvalidValue(
            f"set_of_batch must have an entry for each of {num_batches} batches, got {len(set_of_batch)}"
        )
    if num_batches and not 0 <= int(set_of_batch.min()) <= int(set_of_batch.max()) < len(set_sizes):
        raise InvalidValue(f"set_of_batch must hold sets 0 to {len(set_sizes) - 1}, got {set_of_batch.tolist()[:8]} …")
    widths = torch.tensor([width for rows, width in pairs for _ in range(rows)], device=order.device)
    found = torch.zeros_like(set_sizes).index_add_(0, set_of_batch, widths.to(torch.int64))
    if not torch.equal(found, set_sizes):
        raise InvalidValue("set_sizes must be the sizes of each set's batches, added up")
