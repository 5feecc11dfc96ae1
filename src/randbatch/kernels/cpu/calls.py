"""How the functions of attention.cpp are called: tensors and batches as C structures, checked before they are read.

C++ reads and writes where these say. So every tensor must be what it is taken for, in memory that there is; that the
numbers in `order` are tokens, each once, was checked where the partition was made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from randbatch._errors import InvalidType, InvalidValue
from randbatch.kernels.backend import Grads
from randbatch.kernels.fused import Batches

__all__ = ["attend_backward", "attend_forward", "is_plain"]


class _Rows(ctypes.Structure):
    """`Rows` of attention.cpp."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64))


class _Batches(ctypes.Structure):
    """`Batches` of attention.cpp. `held` are the tensors that it points to."""

    held: tuple[Tensor | None, ...]

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("order", "starts", "widths", "shift")),
        *((name, ctypes.c_int64) for name in ("batches", "heads", "widest", "threads", "size_d", "size_e")),
        ("seed", ctypes.c_uint64),
        ("dropout_p", ctypes.c_double),
        ("scale", ctypes.c_float),
    )


def _address(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where the numbers of a tensor are.

    Raises:
        TypeError: they are of another dtype, or not in this machine's memory as they are.
        ValueError: there are others than so many.
    """
    if x.dtype != dtype:
        raise InvalidType(f"the compiled kernel takes {name} of {dtype}, got {x.dtype}")
    if x.shape != shape:
        raise InvalidValue(f"the compiled kernel takes {name} of shape {list(shape)}, got {list(x.shape)}")
    address = _memory(x)
    if address is None:
        raise InvalidType(
            f"the compiled kernel takes {name} as a plain tensor in the memory of a CPU, got {type(x).__name__} on"
            f" {x.device}, whose numbers it cannot read as they are; use backend 'reference'"
        )
    return address


def _memory(x: Tensor) -> int | None:
    """Where the numbers are, as they are; None of a wrapper, of fakes, and of what is negated when it is read."""
    if not x.is_cpu or x.layout != torch.strided or x.is_neg() or x.is_conj():
        return None
    try:
        if type(x) is not Tensor and x.untyped_storage().device.type != "cpu":  # fakes say that they are on a CPU
            return None
        address = x.data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper without storage
        return None
    return address if address or not x.numel() else None


def is_plain(x: Tensor) -> bool:
    """Whether the numbers are in memory as they are, one after the other."""
    return _memory(x) is not None and x.is_contiguous()


def _dense(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> ctypes.c_void_p:
    address = _address(name, x, dtype, shape)
    if not x.is_contiguous():
        raise InvalidValue(f"the compiled kernel takes {name} contiguous, got strides {x.stride()}")
    return ctypes.c_void_p(address)


def _rows(name: str, x: Tensor, *shape: int) -> _Rows:
    address = _address(name, x, torch.float32, shape)
    row, head, number = x.stride()
    if number != 1 and x.shape[2] > 1:
        raise InvalidValue(
            f"the compiled kernel takes {name} with adjacent numbers in a head, got strides {x.stride()}"
        )
    return _Rows(address, row, head)


def _told(batches: Batches, tokens: int, heads: int, size_d: int, size_e: int, threads: int) -> _Batches:
    rows, widths = batches.groups[::2], batches.groups[1::2]
    if min(batches.groups) < 0 or sum(row * width for row, width in zip(rows, widths, strict=True)) != tokens:
        raise InvalidValue(f"the compiled kernel takes batches of {tokens} tokens in all, got {list(batches.groups)}")
    num_batches = sum(rows)
    seed = 0
    if batches.dropout_p > 0:
        if batches.seed is None or batches.seed.numel() != 1:
            raise InvalidValue("the compiled kernel takes one seed where weights are dropped")
        seed = int(batches.seed)
    order, starts, widths_of = (x.contiguous() for x in (batches.order, batches.starts, batches.widths))
    shift = None if batches.shift is None else batches.shift.contiguous()
    told = _Batches(
        _dense("order", order, torch.int64, tokens),
        _dense("starts", starts, torch.int64, num_batches),
        _dense("widths", widths_of, torch.int64, num_batches),
        None if shift is None else _dense("shift", shift, torch.float32, num_batches, heads),
        num_batches,
        heads,
        max(widths),
        threads,
        size_d,
        size_e,
        seed,
        batches.dropout_p,
        batches.scale,
    )
    told.held = order, starts, widths_of, shift  # as long as C++ reads them
    return told


def _run(function: Callable[..., int], told: _Batches, *args: ctypes.Structure | ctypes.c_void_p | None) -> None:
    if function(ctypes.byref(told), *args):
        raise MemoryError(
            f"not enough memory for the scratch of {told.threads} threads with batches of {told.widest} tokens:"
            " take smaller batches, or fewer threads (torch.set_num_threads)"
        )


def attend_forward(
    library: ctypes.CDLL,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    batches: Batches,
    threads: int,
) -> None:
    """Fill `out` `[N, H, E]` and the log-sum-exp `lse` `[N, H]`.

    Raises:
        TypeError: a tensor that C++ cannot read.
        ValueError: a shape or stride that is not taken.
        MemoryError: there is too little for the scratch of the threads.
    """
    if not batches.groups:
        return
    tokens, heads, size_d = query.shape
    size_e = value.shape[-1]
    told = _told(batches, tokens, heads, size_d, size_e, threads)
    inputs = (_rows(name, x, tokens, heads, size_d) for name, x in (("query", query), ("key", key)))
    others = (_rows(name, x, tokens, heads, size_e) for name, x in (("value", value), ("out", out)))
    _run(library.attend_forward, told, *inputs, *others, _dense("lse", lse, torch.float32, tokens, heads))


def attend_backward(
    library: ctypes.CDLL,
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: Grads,
    batches: Batches,
    threads: int,
) -> None:
    """Fill the gradients of query, key and value. It raises as `attend_forward` does."""
    if not batches.groups:
        return
    tokens, heads, size_d = query.shape
    size_e = value.shape[-1]
    told = _told(batches, tokens, heads, size_d, size_e, threads)
    of_query = tokens, heads, size_d
    of_value = tokens, heads, size_e
    to_query, to_key, to_value = grads
    _run(
        library.attend_backward,
        told,
        _rows("grad", grad, *of_value),
        None if grad_lse is None else _dense("grad_lse", grad_lse, torch.float32, tokens, heads),
        _rows("query", query, *of_query),
        _rows("key", key, *of_query),
        _rows("value", value, *of_value),
        _rows("out", out, *of_value),
        _dense("lse", lse, torch.float32, tokens, heads),
        _rows("the gradient of query", to_query, *of_query),
        _rows("the gradient of key", to_key, *of_query),
        _rows("the gradient of value", to_value, *of_value),
    )
