"""What calls the compiled functions of the CPU backend: tensors and batches as C structures."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from randbatch.kernels.backend import Grads
from randbatch.kernels.cpu.build import library, why_not_built
from randbatch.kernels.fused import Batches, define_operators

__all__ = ["OPERATORS", "why_not_built_for"]

_LANES = 16  # of the longest vectors, AVX-512's


def _sizes(head_size: int, value_size: int) -> tuple[str, str]:
    """What is compiled for heads of these sizes: few libraries, since each takes a second or two."""
    size, other = (-(-size // _LANES) * _LANES for size in (head_size, value_size))
    return f"SIZE_D={size}", f"SIZE_E={other}"


def why_not_built_for(head_size: int, value_size: int) -> str | None:
    """None once it is built for heads of these sizes, otherwise the reason."""
    return why_not_built("attention", *_sizes(head_size, value_size))


class _Rows(ctypes.Structure):
    """`Rows` of attention.cpp."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64))


class _Batches(ctypes.Structure):
    """`Batches` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("order", "starts", "widths", "shift")),
        *((name, ctypes.c_int64) for name in ("batches", "heads", "widest", "threads", "size_d", "size_e")),
        ("seed", ctypes.c_uint64),
        ("dropout_p", ctypes.c_double),
        ("scale", ctypes.c_float),
    )


def _rows(x: Tensor) -> _Rows:
    row, head, _ = x.stride()
    return _Rows(x.data_ptr(), row, head)


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _call(name: str, batches: Batches, query: Tensor, value: Tensor, *args: ctypes.Structure | ctypes.c_void_p) -> None:
    if not batches.groups:
        return
    where = (batches.order, batches.starts, batches.widths)
    order, starts, widths = (x.contiguous() for x in where)  # held until the call is over
    shift = None if batches.shift is None else batches.shift.contiguous()
    told = _Batches(
        *(_address(x) for x in (order, starts, widths, shift)),
        sum(batches.groups[::2]),
        query.shape[1],
        max(batches.groups[1::2]),
        torch.get_num_threads(),
        query.shape[2],
        value.shape[2],
        0 if batches.seed is None else int(batches.seed),
        batches.dropout_p,
        batches.scale,
    )
    getattr(library("attention", *_sizes(query.shape[2], value.shape[2])), name)(ctypes.byref(told), *args)


def _run_forward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, batches: Batches) -> None:
    _call("attend_forward", batches, query, value, *map(_rows, (query, key, value, out)), _address(lse))


def _run_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: Grads,
    batches: Batches,
) -> None:
    inputs = map(_rows, (query, key, value, out))
    told = (_rows(grad), _address(grad_lse), *inputs, _address(lse), *map(_rows, grads))
    _call("attend_backward", batches, query, value, *told)


OPERATORS = define_operators("attend_cpu", _run_forward, _run_backward)
