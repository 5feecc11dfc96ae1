"""Orthogonal partitions: rounds in which no pair of tokens meets twice, until all have met.

A set of n tokens, shuffled, is laid column by column on a grid of B rows, B prime: token t stands at x = t div B,
y = t mod B. Round r puts together the tokens with equal (y − r x) mod B, the lines of slope r of an affine plane. Two
tokens of different columns share a line in exactly one of the B rounds, since x − x' has an inverse modulo B; two of
one column never do. So after B rounds every column is a smaller set in which all pairs are still to meet, and the same
begins again there, until a set fits into one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import islice

import torch
from torch import Tensor

from randbatch._checks import check_batch_vector, check_integer
from randbatch._remember import Remembered
from randbatch._seeds import draw_seed, fold_seed
from randbatch._shapes import Int
from randbatch.partition.draw import by_size, out_of_inference, random_partition
from randbatch.partition.partition import Partition, Partitions
from randbatch.partition.sets import set_sizes, shuffle_sets
from randbatch.partition.traced import traced_partition

__all__ = [
    "OrthogonalRounds",
    "all_rounds",
    "count_rounds",
    "draw_rounds",
    "orthogonal_partitions",
    "partitions_of",
]


@cache
def _next_prime(number: int) -> int:
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


def _num_lines(num_tokens: int, batch_size: int) -> int:
    """B, a prime >= n/p and >= √n: a line has at most p tokens, a row at most B. 0 where one batch holds all n."""
    if num_tokens <= batch_size:
        return 0
    return _next_prime(max(-(-num_tokens // batch_size), math.isqrt(num_tokens - 1) + 1))


def _each(sizes: Tensor, function: Callable[[int], int]) -> Tensor:
    """`function` of every entry, called once for each value."""
    values, where = torch.unique(sizes, return_inverse=True)
    results = [function(size) for size in values.tolist()]
    return torch.tensor(results, dtype=torch.int64, device=sizes.device)[where]


@dataclass(frozen=True, eq=False)
class OrthogonalRounds(Partitions):
    """The rounds of one seed, made one at a time and as often as they are asked for: O(N) memory, however many.

    Args:
        num_tokens: N.
        batch_size: p >= 2, the most tokens in a batch.
        rounds: R >= 1, in batches of p: in each set as many rounds are made as let its tokens meet R (p − 1) others,
            or all (where batches are of one or two, on average). Where a set is through, its tokens stand alone.
        batch: integers `[N]`, the set of each token.
        seed: the only source of randomness.
        device: where the index lives.
        independently: whether two sets of one size are split differently, see `random_partition`.
    """

    num_tokens: int
    batch_size: int
    rounds: int
    batch: Int[Tensor, " n"] | None = None
    seed: int = 0
    device: torch.device | None = None
    independently: bool = False

    @cached_property
    def first(self) -> Partition:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The first round, which is asked for in forward and in backward."""
        return next(iter(self))

    def independent(self) -> Iterator[Partition]:
        """R partitions in batches of p; two tokens may meet in several of them."""
        for position in range(self.rounds):
            yield random_partition(
                self.num_tokens, self.batch_size, batch=self.batch, seed=fold_seed(self.seed, position),
                device=self.device, independent=self.independently,
            )  # fmt: skip

    def __iter__(self) -> Iterator[Partition]:
        parts = all_rounds(
            self.num_tokens, self.batch_size, self.batch, self.seed, self.device,
            rounds=self.rounds, independent=self.independently,
        )  # fmt: skip
        return islice(parts, partitions_of(self.rounds, self.num_tokens, self.batch_size, self.batch))


def partitions_of(rounds: int, num_tokens: int, batch_size: int, batch: Int[Tensor, " n"] | None = None) -> int:
    """How many partitions let every token meet R (p − 1) others, or all; on average, where lines may have one token."""
    return max([1, *(_needed(size, batch_size, rounds) for size in _distinct_sizes(num_tokens, batch))])


def _needed(size: int, batch_size: int, rounds: int) -> int:
    """`partitions_of` one set."""
    lines = _num_lines(size, batch_size)
    if not lines:
        return 1
    # a line may be shorter than p: two batches of more than √n tokens would share a pair
    full, rest = divmod(size, lines)  # columns; a line has a token of each full one
    met = full - 1 if full > 1 else (size**2 - full * lines**2 - rest**2) / (size * lines)
    wanted = math.ceil(rounds * (batch_size - 1) / met)
    return wanted if wanted <= lines else _count(size, batch_size)


def count_rounds(num_tokens: int, batch_size: int, batch: Int[Tensor, " n"] | None = None) -> int:
    """How many partitions `all_rounds` gives: after them every pair has met."""
    return max([1, *(_count(size, batch_size) for size in _distinct_sizes(num_tokens, batch))])


def _distinct_sizes(num_tokens: int, batch: Int[Tensor, " n"] | None) -> list[int]:
    return [num_tokens] if batch is None else set_sizes(batch).unique().tolist()


def _count(num_tokens: int, batch_size: int) -> int:
    """Those of the lines, and then those of the columns."""
    lines = _num_lines(num_tokens, batch_size)
    if not lines:
        return min(max(num_tokens - 1, 0), 1)
    columns = {lines, num_tokens % lines}
    return lines + max(_count(rows, batch_size) for rows in columns)


_BYTES = 24  # of a token: order, inverse, positions
_of_fixed_seeds = Remembered(2**26)


def draw_rounds(
    num_tokens: int,
    batch_size: int,
    rounds: int,
    *,
    batch: Int[Tensor, " n"] | None = None,
    seed: int | None = None,
    device: torch.device | None = None,
) -> Partitions:
    """One random partition, or R orthogonal rounds.

    `seed=None` draws a seed from torch's default generator, and then sets of one size are split differently. The last
    partitions of other seeds are remembered (one set, 64 MiB in all).
    """
    independent = seed is None
    rounds = check_integer("rounds", rounds, 1)
    if seed is None and rounds == 1 and batch is None and num_tokens <= batch_size:
        seed = 0  # one batch: nothing to draw
    if rounds == 1 and torch.compiler.is_compiling():
        return traced_partition(num_tokens, batch_size, batch, seed, device)
    seed = draw_seed() if seed is None else seed
    if rounds == 1:

        def draw() -> Partition:
            return random_partition(
                num_tokens, batch_size, batch=batch, seed=seed, device=device, independent=independent
            )

        if independent or batch is not None:
            return draw()
        return _of_fixed_seeds.get((num_tokens, batch_size, seed, device), _BYTES * num_tokens, draw)
    batch_size = check_integer("batch_size", batch_size, 2)
    return OrthogonalRounds(num_tokens, batch_size, rounds, batch, check_integer("seed", seed), device, independent)


def all_rounds(
    num_tokens: int,
    batch_size: int,
    batch: Tensor | None,
    seed: int,
    device: torch.device | None,
    *,
    rounds: int | None = None,
    independent: bool = False,
) -> Iterator[Partition]:
    """Every round there is, one after the other; tokens of a set that had its R `rounds` stand alone."""
    device = device if device is not None else (torch.device("cpu") if batch is None else batch.device)
    order, sizes = shuffle_sets(
        num_tokens, None if batch is None else batch.to(device), seed, device, independent=independent
    )
    set_of_token = None if batch is None else torch.arange(sizes.numel(), device=device).repeat_interleave(sizes)
    # Of the cell that each token is in: where it begins in `order`, its size, its number of lines, the round there.
    size = sizes.repeat_interleave(sizes)
    start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    lines_of = partial(_num_lines, batch_size=batch_size)
    lines, turn = _each(size, lines_of), torch.zeros_like(size)
    allowed = None  # one set alone is through when all is
    if rounds is not None and set_of_token is not None:
        allowed = _each(size, partial(_needed, batch_size=batch_size, rounds=rounds))
    position = torch.arange(num_tokens, device=device)
    done = size < 2
    made = 0
    while made == 0 or not bool(done.all()):
        whole, rows = lines == 0, lines.clamp(min=1)
        column, row = (position - start) // rows, (position - start) % rows
        line = torch.where(whole, 0, (row - turn * column) % rows)
        key = torch.where(done, position, start + line)  # cells are disjoint ranges, and a cell has fewer lines than n
        by_key = torch.argsort(key, stable=True)
        batch_sizes = torch.unique_consecutive(key[by_key], return_counts=True)[1]
        with out_of_inference():  # it may be kept, and training may be next to want it
            sets = None if set_of_token is None else set_of_token[by_key]
            part = by_size(order[by_key], batch_sizes, sets, None if sets is None else sizes)
        yield part
        made += 1
        turn = turn + 1
        down = ~done & ~whole & (turn == lines)  # all lines are used: each column is a cell of its own
        done = done | whole if allowed is None else done | whole | (allowed <= made)
        start = torch.where(down, start + column * rows, start)
        size = torch.where(down, torch.minimum(rows, size - column * rows), size)
        lines, turn = torch.where(down, _each(size, lines_of), lines), torch.where(down, 0, turn)
        done = done | (size < 2)


def orthogonal_partitions(
    num_tokens: int,
    batch_size: int,
    rounds: int,
    *,
    batch: Int[Tensor, " n"] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[Partition]:
    """R partitions of N tokens in which no pair shares a batch twice; all of them let every pair meet exactly once.

    Lines of an affine plane. The batches of a round differ by at most one token, except where a set has met already;
    such tokens stand alone. In the first rounds a batch has p tokens or a little fewer; where p > √N it has only about
    √N, because two larger batches of different rounds would share a pair. Cost: O(N log N) a round.

    Args:
        num_tokens: N >= 0.
        batch_size: p >= 2, the most tokens in a batch.
        rounds: R >= 1; more than there are gives all, about N/p for p < √N.
        batch: integers `[N]`, the graph of each token; graphs are never mixed. Default: one graph.
        seed: the only source of randomness.
        device: where the index lives. Default: the device of `batch`, otherwise the CPU.

    Returns:
        At most R partitions.

    Raises:
        TypeError: an argument that must be an int is not.
        ValueError: `num_tokens` < 0, `batch_size` < 2, `rounds` < 1, or `batch` does not fit.

    Example:
        >>> parts = orthogonal_partitions(49, 7, 100)
        >>> len(parts), {part.num_slots for part in parts}  # 7 slopes, and the columns
        (8, {7})
    """
    num_tokens = check_integer("num_tokens", num_tokens, 0)
    batch_size = check_integer("batch_size", batch_size, 2)
    rounds = check_integer("rounds", rounds, 1)
    seed = check_integer("seed", seed)
    target = torch.device(device) if device is not None else None
    if batch is not None:
        check_batch_vector(batch, num_tokens, batch.device)
    return list(islice(all_rounds(num_tokens, batch_size, batch, seed, target), rounds))
