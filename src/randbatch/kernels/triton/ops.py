"""What launches the device code of the Triton backend, tile by tile."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from randbatch.kernels.backend import Grads
from randbatch.kernels.fused import Batches, define_operators
from randbatch.kernels.triton.tiles import Launch, backward_launches, block_of, forward_launches

__all__ = ["OPERATORS", "is_interpreted"]


def is_interpreted() -> bool:
    """Whether triton runs its programs one by one in Python, on any device, to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _kernels() -> Any:
    from randbatch.kernels.triton import device  # not before it is needed: triton is optional

    return device


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, torch where the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _constants(query: Tensor, value: Tensor, batches: Batches) -> dict[str, Any]:
    """What is compiled into a kernel beside its tile, and the numbers that all kernels end with."""
    return {
        "SIZE_D": query.shape[2],
        "SIZE_E": value.shape[2],
        "D": block_of(query.shape[2]),
        "E": block_of(value.shape[2]),
        "SHIFT": batches.shift is not None,
        "DROPOUT": batches.dropout_p > 0,
        # float32 is not rounded to TF32: its error shall be that of torch's own float32
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "UPCAST": is_interpreted(),
        "scale": batches.scale,
        "dropout_p": batches.dropout_p,
    }


def _run(kernel: Any, launch: Launch, num_heads: int, *args: Any, scale: float, dropout_p: float, **const: Any) -> None:
    """`args` are the tensors and strides; what follows them is the same for every kernel."""
    tile = launch.tile
    kernel[(launch.rows * launch.num_tiles * num_heads,)](
        *args,
        launch.first,
        num_heads,
        launch.num_tiles,
        scale,
        dropout_p,
        M=tile.rows,
        N=tile.cols,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **const,
    )


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


def _run_forward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, batches: Batches) -> None:
    where = (batches.order, batches.starts, batches.widths, batches.shift, batches.seed)
    args = (query, key, value, *where, out, lse, *_strides(query, key, value))
    constants = _constants(query, value, batches)
    with _guard(query.device):
        for launch in forward_launches(batches.groups, query, value):
            _run(_kernels().attend_forward, launch, query.shape[1], *args, **constants)


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
    dense: Any = tuple(x if x.is_contiguous() else x.new_empty(x.shape) for x in grads)
    num_heads = query.shape[1]
    delta = torch.empty_like(lse)
    strides = _strides(grad, query, key, value)
    constants = _constants(query, value, batches)
    where = (batches.order, batches.starts, batches.widths, batches.shift, batches.seed)
    of_queries, of_keys = backward_launches(batches.groups, query, value, batches.dropout_p > 0)
    with _guard(query.device):
        for launch in of_queries:
            tensors = (grad, query, key, value, out, lse, grad_lse, *where, delta, *dense)
            more = {"WHOLE": launch.is_whole, "GRAD_LSE": grad_lse is not None}
            _run(_kernels().backward_of_queries, launch, num_heads, *tensors, *strides, **constants, **more)
        for launch in of_keys:
            tensors = (grad, query, key, value, lse, delta, *where, *dense[1:])
            _run(_kernels().backward_of_keys, launch, num_heads, *tensors, *strides, **constants)
    for to, found in zip(grads, dense, strict=True):
        if to is not found:
            to.copy_(found)


OPERATORS = define_operators("attend_triton", _run_forward, _run_backward)
