"""Rows to their places in a tensor: what torch does number by number on a CPU, row by row and past the caches."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from randbatch import _rows
from randbatch._shapes import Int, Shaped
from randbatch.kernels.cpu.build import library, why_not_built

__all__ = ["put_rows"]

_CACHED = 2**24  # bytes of a tensor that the caches may still hold when it is read next


def put_rows(to: Shaped[Tensor, "all ..."], rows: Int[Tensor, " n"], x: Shaped[Tensor, "n ..."]) -> None:
    """`to[rows] = x`, in place, for distinct rows of contiguous tensors on a CPU, where there is a compiler.

    For others the same by torch.
    """
    alike = to.dtype == x.dtype and to.shape[1:] == x.shape[1:] and len(rows) == len(x)
    if not alike or not all(tensor.is_contiguous() for tensor in (to, rows, x)) or why_not_built("rows") is not None:
        _rows.put_rows(to, rows, x)
        return
    addresses = (c_void_p(tensor.data_ptr()) for tensor in (to, x, rows))
    size = to.nbytes // max(1, len(to))
    numbers = len(rows), size, to.nbytes > _CACHED, torch.get_num_threads()
    library("rows").put_rows(*addresses, *map(c_int64, numbers))
