"""Which tiles the kernels work in, and which batches are launched together. Nothing here needs triton or a GPU.

Tiles were chosen by compiling: the largest that need no more registers than there are, without spills. A test compiles
them again. What is fastest on a GPU was not tried.

Letters of tiles: M query rows, N key rows, D dimensions of query and key, or of value if those are more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["MAX_SIZE", "TABLE", "Launch", "Tile", "Tiles", "backward_launches", "block_of", "forward_launches"]

MAX_SIZE = 128


@dataclass(frozen=True)
class Tile:
    """M rows of queries, N of keys, and how a program runs: its warps, and the stages of its software pipeline."""

    rows: int
    cols: int
    warps: int
    stages: int

    def within(self, block: int, size: int) -> Tile:
        """The part of it that batches of at most `block` tokens need, with as many warps as still have work."""
        rows, cols = min(self.rows, block), min(self.cols, block)
        busy = (rows, cols) == (self.rows, self.cols) or rows >= 128 or rows * size >= 64 * 128
        return replace(self, rows=rows, cols=cols, warps=self.warps if busy else 4)


@dataclass(frozen=True)
class Tiles:
    """The tiles of each kernel for one kind of GPU and numbers of one size.

    Attributes:
        forward: of `attend_forward`.
        whole: of `backward_of_queries` where M covers a batch, for batches of more and more tokens.
        dropout: the same with dropout, which needs more registers.
        queries: of `backward_of_queries` for longer batches.
        keys: of `backward_of_keys`.
    """

    forward: Tile
    whole: tuple[Tile, ...]
    dropout: tuple[Tile, ...]
    queries: Tile
    keys: Tile


_T = Tile
_LARGE = Tile(128, 64, 8, 2)

TABLE: dict[tuple[int, int, int], Tiles] = {  # compute capability × 10, bytes of a number, D
    (90, 2, 16): Tiles(_T(128, 64, 8, 3), (_LARGE, _T(256, 64, 8, 2)), (_LARGE,), _LARGE, _LARGE),
    (90, 2, 32): Tiles(_T(128, 64, 8, 3), (_LARGE, _T(256, 64, 8, 2)), (_LARGE,), _LARGE, _LARGE),
    (90, 2, 64): Tiles(_T(128, 64, 8, 3), (_LARGE, _T(256, 64, 8, 1)), (_LARGE,), _LARGE, _LARGE),
    (90, 2, 128): Tiles(
        _T(128, 64, 8, 3), (_T(64, 64, 8, 2), _T(128, 64, 8, 1)), (_T(64, 32, 4, 1),), _LARGE, _T(128, 64, 8, 1)
    ),
    (80, 2, 16): Tiles(_T(128, 64, 8, 3), (_LARGE, _T(256, 64, 8, 2)), (_LARGE,), _LARGE, _LARGE),
    (80, 2, 32): Tiles(_T(128, 32, 8, 3), (_LARGE, _T(256, 32, 8, 2)), (_LARGE,), _LARGE, _T(64, 64, 4, 2)),
    (80, 2, 64): Tiles(
        _T(128, 64, 8, 3), (_T(64, 32, 4, 2), _T(128, 32, 8, 2)), (_T(64, 32, 4, 2),), _LARGE, _T(128, 32, 8, 2)
    ),
    (80, 2, 128): Tiles(
        _T(128, 32, 8, 3), (_T(64, 32, 8, 2),), (_T(64, 32, 8, 2),), _T(128, 32, 8, 2), _T(64, 64, 8, 1)
    ),
    (90, 4, 16): Tiles(_T(64, 64, 4, 3), (_T(64, 32, 8, 2),), (_T(64, 32, 8, 2),), _T(64, 32, 8, 2), _T(64, 32, 8, 2)),
    (90, 4, 32): Tiles(_T(64, 64, 8, 3), (_T(32, 32, 8, 2),), (_T(32, 32, 8, 2),), _T(32, 32, 4, 1), _T(32, 32, 4, 1)),
    (90, 4, 64): Tiles(_T(64, 32, 8, 3), (_T(32, 32, 8, 1),), (_T(32, 32, 8, 1),), _T(32, 32, 8, 2), _T(32, 32, 8, 2)),
    (90, 4, 128): Tiles(_T(32, 16, 8, 2), (_T(16, 16, 8, 1),), (_T(16, 16, 8, 1),), _T(16, 16, 8, 1), _T(32, 32, 8, 1)),
    (80, 4, 16): Tiles(_T(64, 64, 4, 3), (_T(64, 32, 8, 1),), (_T(64, 32, 8, 1),), _T(64, 32, 8, 2), _T(64, 32, 8, 2)),
    (80, 4, 32): Tiles(_T(64, 64, 8, 3), (_T(32, 32, 4, 1),), (_T(32, 32, 4, 1),), _T(32, 32, 4, 1), _T(32, 32, 8, 2)),
    (80, 4, 64): Tiles(_T(64, 32, 8, 3), (_T(32, 32, 8, 2),), (_T(32, 32, 8, 2),), _T(32, 32, 8, 1), _T(32, 32, 8, 2)),
    (80, 4, 128): Tiles(_T(64, 32, 8, 3), (_T(16, 16, 8, 1),), (_T(16, 16, 8, 1),), _T(16, 16, 8, 1), _T(32, 32, 8, 1)),
}


def block_of(size: int) -> int:
    """The next power of two, at least 16, which is the least that the tensor cores multiply."""
    return max(16, 1 << (size - 1).bit_length())


def _kind_of(device: torch.device) -> int:
    """Hopper and datacentre Blackwell have 227 KiB of shared memory for a program; others, some only 99."""
    if device.type != "cuda":
        return 80
    return 90 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 80


def _tiles_for(query: Tensor, value: Tensor) -> tuple[Tiles, int]:
    size = block_of(max(query.shape[2], value.shape[2]))
    return TABLE[_kind_of(query.device), query.element_size(), size], size


@dataclass(frozen=True)
class Launch:
    """Batches `first … first + rows − 1`, `num_tiles` programs for each head of each.

    Attributes:
        first: number of the first batch.
        rows: how many batches.
        num_tiles: that cover the widest of them.
        tile: of each program.
        is_whole: whether the M rows of a tile cover a batch.
    """

    first: int
    rows: int
    num_tiles: int
    tile: Tile
    is_whole: bool = False


def _classes(groups: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, rows, width) of neighbouring batches whose widths round up to one power of two; width is the largest."""
    first = rows = width = 0
    for more, next_width in zip(groups[::2], groups[1::2], strict=True):
        if rows and block_of(next_width) != block_of(width):
            yield first, rows, width
            first, rows = first + rows, 0
        width = width if rows else next_width
        rows += more
    if rows:
        yield first, rows, width


def _whole_tile(tiles: Tiles, block: int, dropout: bool) -> Tile | None:
    return next((tile for tile in (tiles.dropout if dropout else tiles.whole) if tile.rows >= block), None)


def forward_launches(groups: Sequence[int], query: Tensor, value: Tensor) -> Iterator[Launch]:
    """Of `attend_forward`."""
    tiles, size = _tiles_for(query, value)
    for first, rows, width in _classes(groups):
        tile = tiles.forward.within(block_of(width), size)
        yield Launch(first, rows, -(-width // tile.rows), tile)


def backward_launches(
    groups: Sequence[int], query: Tensor, value: Tensor, dropout: bool
) -> tuple[list[Launch], list[Launch]]:
    """Of `backward_of_queries`, and of `backward_of_keys` for the batches that the first did not finish."""
    tiles, size = _tiles_for(query, value)
    queries: list[Launch] = []
    keys: list[Launch] = []
    for first, rows, width in _classes(groups):
        block = block_of(width)
        whole = _whole_tile(tiles, block, dropout)
        if whole is not None:
            queries.append(Launch(first, rows, 1, whole.within(block, size), is_whole=True))
            continue
        of_queries, of_keys = tiles.queries.within(block, size), tiles.keys.within(block, size)
        queries.append(Launch(first, rows, -(-width // of_queries.rows), of_queries))
        keys.append(Launch(first, rows, -(-width // of_keys.cols), of_keys))
    return queries, keys
