"""Rows to their places in a tensor: what torch does number by number on a CPU, row by row and past the caches."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from randbatch import _rows
from randbatch._shapes import Int, Shaped
from randbatch.kernels.cpu.build import Library
from randbatch.kernels.cpu.calls import is_plain

__all__ = ["scatter_rows"]

_CACHED = 2**24  # bytes of a tensor that the caches may still hold when it is read next


def scatter_rows(to: Shaped[Tensor, "all ..."], rows: Int[Tensor, " n"], x: Shaped[Tensor, "n ..."]) -> None:
    """`to[rows] = x`, in place, for distinct rows of contiguous tensors on a CPU, where there is a compiler.

    For others the same by torch. The rows must be there: they are those of a partition, which was checked.
    """
    alike = to.dtype == x.dtype and to.shape[1:] == x.shape[1:] and rows.shape == x.shape[:1] and to.dim() > 0
    plain = alike and rows.dtype == torch.int64 and all(is_plain(tensor) for tensor in (to, rows, x))
    if not plain or _is_recorded(to, x) or _LIBRARY.why_not() is not None:
        _rows.scatter_rows(to, rows, x)
        return
    size = to.nbytes // max(1, len(to))
    _put(_LIBRARY.functions(), to, x, rows, size, to.nbytes > _CACHED, torch.get_num_threads())


def _is_recorded(to: Tensor, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (to.requires_grad or x.requires_grad)


def _put(functions: ctypes.CDLL, to: Tensor, x: Tensor, rows: Tensor, size: int, streams: bool, threads: int) -> None:
    addresses = (c_void_p(tensor.data_ptr()) for tensor in (to, x, rows))
    functions.scatter_rows(*addresses, *map(c_int64, (len(rows), size, streams, threads)))


def _whats_wrong(functions: ctypes.CDLL) -> str | None:
    """Two rows to their places, by either kind of stores."""
    if not hasattr(functions, "scatter_rows"):
        return "there is no function scatter_rows"
    for streams in (0, 1):
        to, x, rows = ctypes.create_string_buffer(256), bytes(range(128)), (c_int64 * 2)(2, 0)
        functions.scatter_rows(to, x, rows, *map(c_int64, (2, 64, streams, 1)))
        if to.raw != x[64:] + bytes(64) + x[:64] + bytes(64):
            return "rows are not where they should be"
    return None


_LIBRARY = Library("rows", (), _whats_wrong)
