"""Random partitions inside `torch.compile`.

A traced program cannot look at a number that is drawn, and a partition of several sets has as many widths as the sets'
sizes bring about. So the order of one set is drawn by an operator that the compiler does not look into, and widths
follow from N and p. The operator draws from torch's default CPU generator as eager code does, in its turn, so that
`torch.manual_seed` gives the same partitions compiled or not.

Shape letters: N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from randbatch._seeds import draw_seed
from randbatch._shapes import Int
from randbatch.partition.draw import UNTRACEABLE, balanced_groups
from randbatch.partition.partition import Partition
from randbatch.partition.sets import shuffle_sets

__all__ = ["traced_partition"]

_INT64 = 2**63

# Drawing is a side effect. The tag keeps the compiler from drawing again in backward, or not at all; `turn`, a fresh
# empty tensor, from merging the draws of two layers: only torch's own random operators, and `empty`, are never merged.
torch.library.define(
    "randbatch::random_order",
    "(Tensor turn, SymInt num_tokens, SymInt? seed, Device device) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)


@torch.library.impl("randbatch::random_order", "CompositeExplicitAutograd")
def _random_order(turn: Tensor, num_tokens: int, seed: int | None, device: torch.device) -> Tensor:
    seed = draw_seed() if seed is None else seed
    return shuffle_sets(num_tokens, None, seed, device)[0]


def _random_order_fake(turn: Tensor, num_tokens: int, seed: int | None, device: torch.device) -> Tensor:
    return torch.empty(num_tokens, dtype=torch.int64, device=device)


torch.library.register_fake("randbatch::random_order", _random_order_fake)


def traced_partition(
    num_tokens: int, batch_size: int, batch: Int[Tensor, " n"] | None, seed: int | None, device: torch.device | None
) -> Partition:
    """`random_partition` of one set, for `torch.compile`; `seed=None` draws one when the program runs."""
    if batch is not None:
        raise NotImplementedError(UNTRACEABLE)
    device = torch.device("cpu") if device is None else device
    batch_size = min(batch_size, max(num_tokens, 1))
    groups = balanced_groups(num_tokens, batch_size)
    if seed is not None and not -_INT64 <= seed < _INT64:
        seed = (seed + _INT64) % (2 * _INT64) - _INT64  # only its last 64 bits count
    if num_tokens <= batch_size:
        return Partition(torch.arange(num_tokens, device=device), groups, in_order=True, is_checked=True)
    operator: Any = torch.ops.randbatch.random_order
    return Partition(operator(torch.empty(0), num_tokens, seed, device), groups, is_checked=True)
