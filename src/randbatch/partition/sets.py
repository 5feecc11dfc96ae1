"""The sets (graphs) of a `batch` vector: how many tokens each has, and which place a token has in its own.

Sets are numbered in the order of their ids. Ids may be any integers: time and memory depend on how many sets there are,
not on how large their ids are.

Shape letters: N tokens, G sets that have tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randbatch._seeds import fold_seed, hash_positions, random_keys
from randbatch._shapes import Int

__all__ = ["largest_set", "number_sets", "set_sizes", "shuffle_sets"]

_SALT = 2**41  # no layer, round or sample has this number


def set_sizes(batch: Int[Tensor, " n"]) -> Int[Tensor, " g"]:
    """The number of tokens of each set that has any, int64 `[G]`, by ascending id.

    >>> set_sizes(torch.tensor([7, 10**12, 7])).tolist()
    [2, 1]
    """
    return torch.unique(batch, return_counts=True)[1]


def largest_set(num_tokens: int, batch: Int[Tensor, " n"] | None) -> int:
    """The size of the largest set; N where there is one."""
    return num_tokens if batch is None or num_tokens == 0 else int(set_sizes(batch).max())


def number_sets(batch: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " g"], bool]:
    """The number of each token's set `[N]`, the sizes of the sets `[G]`, and whether the sets stand one by one."""
    if bool((batch[1:] >= batch[:-1]).all()):  # as in a mini-batch of torch_geometric: nothing has to be sorted
        sizes = torch.unique_consecutive(batch, return_counts=True)[1]
        return torch.arange(len(sizes), device=batch.device).repeat_interleave(sizes), sizes, True
    _, number, sizes = torch.unique(batch, return_inverse=True, return_counts=True)
    return number, sizes, False


def shuffle_sets(
    num_tokens: int, batch: Int[Tensor, " n"] | None, seed: int, device: torch.device, *, independent: bool = False
) -> tuple[Int[Tensor, " n"], Int[Tensor, " g"]]:
    """The tokens set after set, at random inside each, `[N]`, and the sizes of the sets that have tokens, `[G]`.

    The order inside a set depends on its size and the seed alone, as if it were the only one; with `independent` also
    on its number, so that two sets of one size differ.
    """
    if batch is None:
        keys = random_keys(num_tokens, seed, device)
        return torch.argsort(keys, stable=True), torch.full((1,), num_tokens, device=device)
    number, sizes, ordered = number_sets(batch)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(num_tokens, device=device) - starts.repeat_interleave(sizes)  # of the tokens, set after set
    if not ordered:
        place = torch.empty_like(place).index_copy_(0, torch.argsort(number, stable=True), place)
    salt = random_keys(len(sizes), fold_seed(seed, _SALT), device)[number] if independent else None
    keys = hash_positions(place, seed, salt)
    set_bits = max(len(sizes) - 1, 0).bit_length()
    # The set goes above the random bits, so one sort orders by set and at random inside it.
    return torch.argsort((keys >> set_bits) + (number << (63 - set_bits)), stable=True), sizes
