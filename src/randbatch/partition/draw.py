"""Random partitions of N tokens into batches of about p, and random subsets.

A partition is a function of `(num_tokens, batch_size, batch, seed)` alone: it is the same on every device, under every
thread count and on every rank. What a set (graph) gets depends on its size and the seed, not on its neighbours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from randbatch._checks import check_batch_vector, check_integer
from randbatch._seeds import random_keys
from randbatch._shapes import Int
from randbatch.partition.partition import Partition
from randbatch.partition.sets import shuffle_sets

__all__ = [
    "UNTRACEABLE",
    "any_partition",
    "balanced_groups",
    "by_size",
    "out_of_inference",
    "random_partition",
    "random_subsets",
]

UNTRACEABLE = (
    "torch.compile cannot trace random batches of several sets here, and meta and fake tensors have none: how many "
    "batches there are of each size is known only when they are drawn. Leave out batch and mask, or compile without "
    "fullgraph=True"
)


def _is_zero(number: int) -> bool:
    """Whether a number is 0; False for a symbol that may be."""
    if not torch.compiler.is_compiling():
        return number == 0
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, and loaded by now

    return statically_known_true(number == 0)


def balanced_groups(num_tokens: int, batch_size: int) -> tuple[tuple[int, int], ...]:
    """M = ceil(N / p) batches whose sizes differ by at most one, as `((rows, width), …)`, widest first."""
    num_batches = -(-num_tokens // batch_size)
    if num_batches == 0:
        return ()
    width = num_tokens // num_batches  # not divmod, which is not traced where N is a symbol
    wider = num_tokens - width * num_batches
    groups = ((wider, width + 1), (num_batches - wider, width))
    # where N is a symbol there may be no batch of the first size: one program then serves every N
    return tuple((rows, width) for rows, width in groups if not _is_zero(rows))


_remembered_groups = lru_cache(maxsize=256)(balanced_groups)


def _partition_sets(order: Tensor, counts: Tensor, batch_size: int) -> Partition:
    """Split each set into its own balanced batches; bring batches of equal size together."""
    set_of_token = torch.arange(counts.numel(), device=order.device).repeat_interleave(counts)
    num_batches = (counts + batch_size - 1).div(batch_size, rounding_mode="floor")
    width = counts.div(num_batches, rounding_mode="floor")
    first = num_batches.cumsum(0) - num_batches
    position = torch.arange(int(num_batches.sum()), device=order.device) - first.repeat_interleave(num_batches)
    wider = (counts - width * num_batches).repeat_interleave(num_batches)
    sizes = width.repeat_interleave(num_batches) + (position < wider)
    return by_size(order, sizes, set_of_token, counts)


def by_size(order: Tensor, sizes: Tensor, set_of_token: Tensor | None, set_sizes: Tensor | None) -> Partition:
    """The partition whose batches, of `sizes` `[M]`, stand one after the other in `order`; widest first.

    `set_of_token` says for each position of `order` which set its token is of.
    """
    widths, rows = torch.unique(sizes, return_counts=True)  # ascending
    if widths.numel() > 1:
        by_width = torch.argsort(sizes.repeat_interleave(sizes), descending=True, stable=True)
        order = order[by_width]
        set_of_token = None if set_of_token is None else set_of_token[by_width]
        sizes = sizes.sort(descending=True).values
    set_of_batch = None if set_of_token is None else set_of_token[sizes.cumsum(0) - sizes]
    groups = zip(reversed(rows.tolist()), reversed(widths.tolist()), strict=True)
    return Partition(order, tuple(groups), set_of_batch, set_sizes, is_checked=True)


def any_partition(num_tokens: int, batch_size: int, batch: Int[Tensor, " n"] | None, device: torch.device) -> Partition:
    """Batches of the right sizes of tokens without elements (meta and fake tensors), in any order."""
    if batch is not None:
        raise NotImplementedError(UNTRACEABLE)
    groups = balanced_groups(num_tokens, min(batch_size, max(num_tokens, 1)))
    return Partition(torch.arange(num_tokens, device=device), groups, in_order=True, is_checked=True)


def out_of_inference() -> AbstractContextManager[Any]:
    """Where tensors may be kept for training; entering it costs nothing outside of inference mode."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def random_partition(
    num_tokens: int,
    batch_size: int,
    *,
    batch: Int[Tensor, " n"] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    independent: bool = False,
) -> Partition:
    """Split N tokens at random into M = ceil(N / p) batches whose sizes differ by at most one.

    Every token is hashed with the seed and the hashes are sorted, so each of the (N!) orders is equally likely as far
    as a 63-bit hash can tell, and two tokens share a batch with probability (p−1)/(N−1). Cost: O(N log N), 0.05 s for
    a million tokens on two CPU cores.

    Args:
        num_tokens: N >= 0.
        batch_size: p >= 2, the number of tokens in a batch. With p >= N there is one batch.
        batch: integers `[N]`, the graph of each token, in any order; graphs are never mixed. Default: one graph.
        seed: the only source of randomness. Any int.
        device: where the index lives. Default: the device of `batch`, otherwise the CPU. It does not change the result.
        independent: whether two graphs of one size are split differently. Default: False, what a graph gets depends on
            its size and the seed alone, whatever else is in `batch`; training draws independently.

    Returns:
        A `Partition` whose `index` is `[M, P]`.

    Raises:
        TypeError: `num_tokens`, `batch_size` or `seed` is not an int, or `batch` is not of an integer dtype.
        ValueError: `num_tokens` < 0, `batch_size` < 2, `batch` has another length than N, or negative entries.

    Source: Jin, Li, Liu, arXiv 1812.10575, algorithm 1 (RBM-1).

    Example:
        >>> part = random_partition(10, 4, seed=1)
        >>> part.groups  # one batch of 4 and two of 3
        ((1, 4), (2, 3))
        >>> sorted(part.order.tolist()) == list(range(10))
        True
    """
    num_tokens = check_integer("num_tokens", num_tokens, 0)
    batch_size = min(check_integer("batch_size", batch_size, 2), max(num_tokens, 1))
    seed = check_integer("seed", seed)
    target = torch.device(device) if device is not None else (torch.device("cpu") if batch is None else batch.device)
    with out_of_inference():  # it may be kept, and training may be next to want it
        if batch is not None:
            check_batch_vector(batch, num_tokens, batch.device)
            order, counts = shuffle_sets(num_tokens, batch.to(target), seed, target, independent=independent)
            return _partition_sets(order, counts, batch_size)
        traced = torch.compiler.is_compiling()
        groups = (balanced_groups if traced else _remembered_groups)(num_tokens, batch_size)
        if num_tokens <= batch_size:  # one batch: nothing to draw
            return Partition(torch.arange(num_tokens, device=target), groups, in_order=True, is_checked=True)
        order = torch.argsort(random_keys(num_tokens, seed, target), stable=True)  # as `shuffle_sets`
        return Partition(order, groups, is_checked=True)


def random_subsets(
    num_tokens: int, batch_size: int, draws: int, *, seed: int = 0, device: torch.device | str | None = None
) -> Int[Tensor, "draws p"]:
    """Independent random sets of p different tokens out of N, each equally likely: O(draws · p²) operations.

    Args:
        num_tokens: N >= 2.
        batch_size: p, from 2 to N.
        draws: how many sets.
        seed: the only source of randomness. Any int.
        device: where the index lives. Default: the CPU. It does not change the result.

    Returns:
        int64 `[draws, p]`. The order inside a set is not random.

    Raises:
        TypeError: an argument that must be an int is not.
        ValueError: `batch_size` < 2 or > N, or `draws` < 0.

    Source: Jin, Li, Liu, arXiv 1812.10575, algorithm 2 (RBM-r). The sets are Floyd's (Bentley, Floyd, "A sample of
    brilliance", CACM 30 (1987)): p hashes a set, whatever N.

    Example:
        >>> random_subsets(10, 3, 2, seed=1).shape
        torch.Size([2, 3])
    """
    batch_size = check_integer("batch_size", batch_size, 2)
    num_tokens = check_integer("num_tokens", num_tokens, batch_size)
    draws = check_integer("draws", draws, 0)
    keys = random_keys(draws * batch_size, check_integer("seed", seed), torch.device(device or "cpu"))
    keys = keys.view(draws, batch_size)
    for slot in range(batch_size):
        last = num_tokens - batch_size + slot
        token = keys[:, slot] % (last + 1)
        taken = (keys[:, :slot] == token.unsqueeze(1)).any(dim=1)
        keys[:, slot] = torch.where(taken, last, token)
    return keys
