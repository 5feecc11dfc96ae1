"""Two custom operators of torch around the device code: attention inside random batches, and its gradients.

torch sees an operator with known shapes and a derivative, so that eager mode, `torch.compile` and autograd all take it.

Shape letters: N tokens, M batches, H heads, D head size of query and key, E of value. `groups` lists rows and width of
each batch size one after the other, `[rows, width, rows, width, …]`, widest first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from randbatch.kernels.triton.tiles import Launch, backward_launches, block_of, forward_launches

__all__ = ["attend", "backward", "is_interpreted"]

_BATCHES = "Tensor order, Tensor starts, Tensor widths, int[] groups"
_OPTIONS = "Tensor? shift, Tensor? seed, float scale, float dropout_p"


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


def _dense(x: Tensor) -> Tensor:
    """The kernels take any stride of tokens and heads, not of the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(query: Tensor, value: Tensor, shift: Tensor | None, dropout_p: float) -> dict[str, Any]:
    """What is compiled into a kernel beside its tile."""
    return {
        "SIZE_D": query.shape[2],
        "SIZE_E": value.shape[2],
        "D": block_of(query.shape[2]),
        "E": block_of(value.shape[2]),
        "SHIFT": shift is not None,
        "DROPOUT": dropout_p > 0,
        # float32 is not rounded to TF32: its error shall be that of torch's own float32
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "UPCAST": is_interpreted(),
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


@torch.library.custom_op(
    "randbatch::attend",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_BATCHES}, {_OPTIONS}) -> (Tensor, Tensor)",
)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    starts: Tensor,
    widths: Tensor,
    groups: Sequence[int],
    shift: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output `[N, H, E]` and log-sum-exp `[N, H]` of softmax attention inside the batches.

    Args:
        query: `[N, H, D]`, fp32, bf16 or fp16, in token order, as are all tensors of tokens.
        key: `[N, H, D]`.
        value: `[N, H, E]`.
        order: int64 `[N]`, the token at each position of batch order.
        starts: int64 `[M]`, where each batch begins in `order`.
        widths: int64 `[M]`, how many tokens it has.
        groups: the same widths, as numbers.
        shift: fp32 `[M, H]`, added to the logit of a token with itself; −∞ leaves it out. None is 0.
        seed: int64 `[1]`, of the dropped weights; None without dropout.
        scale: factor of the logits.
        dropout_p: probability that a weight is dropped.
    """
    query, key, value = _dense(query), _dense(key), _dense(value)
    num_tokens, num_heads, size = value.shape
    out = value.new_empty(num_tokens, num_heads, size)
    lse = query.new_empty(num_tokens, num_heads, dtype=torch.float32)
    tensors = (query, key, value, order, starts, widths, shift, seed, out, lse)
    constants = _constants(query, value, shift, dropout_p)
    with _guard(query.device):
        for launch in forward_launches(groups, query, value):
            _run(
                _kernels().attend_forward,
                launch,
                num_heads,
                *tensors,
                *_strides(query, key, value),
                scale=scale,
                dropout_p=dropout_p,
                **constants,
            )
    return out, lse


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op(
    "randbatch::attend_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
        f"{_BATCHES}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
    ),
)
def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    order: Tensor,
    starts: Tensor,
    widths: Tensor,
    groups: Sequence[int],
    shift: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for weights `exp(logit − lse)`; other arguments as in `attend`.

    Args:
        grad: `[N, H, E]`, of the output.
        grad_lse: `[N, H]`, of the log-sum-exp; None is 0.
        query: `[N, H, D]`.
        key: `[N, H, D]`.
        value: `[N, H, E]`.
        out: `[N, H, E]`, the output; it and `lse` may be those of attention over more keys.
        lse: fp32 `[N, H]`.
        order: see `attend`.
        starts: see `attend`.
        widths: see `attend`.
        groups: see `attend`.
        shift: see `attend`.
        seed: see `attend`.
        scale: see `attend`.
        dropout_p: see `attend`.
    """
    grad, query, key, value = _dense(grad), _dense(query), _dense(key), _dense(value)
    out, lse = out.contiguous(), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    num_heads = query.shape[1]
    grads = tuple(x.new_empty(x.shape) for x in (query, key, value))
    delta = torch.empty_like(lse)
    strides = _strides(grad, query, key, value)
    constants = _constants(query, value, shift, dropout_p) | {"scale": scale, "dropout_p": dropout_p}
    batches = (order, starts, widths, shift, seed)
    of_queries, of_keys = backward_launches(groups, query, value, dropout_p > 0)
    with _guard(query.device):
        for launch in of_queries:
            tensors = (grad, query, key, value, out, lse, grad_lse, *batches, delta, *grads)
            more = {"WHOLE": launch.is_whole, "GRAD_LSE": grad_lse is not None}
            _run(_kernels().backward_of_queries, launch, num_heads, *tensors, *strides, **constants, **more)
        for launch in of_keys:
            tensors = (grad, query, key, value, lse, delta, *batches, *grads[1:])
            _run(_kernels().backward_of_keys, launch, num_heads, *tensors, *strides, **constants)
    return grads[0], grads[1], grads[2]


@backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, groups, shift, seed, scale, dropout_p = inputs
    query, key, value, *batches = tensors
    ctx.save_for_backward(query, key, value, *output, *batches, shift, seed)
    ctx.options = groups, scale, dropout_p


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, shift, seed = ctx.saved_tensors
    groups, scale, dropout_p = ctx.options
    grads = backward(grad, grad_lse, *tensors, groups, shift, seed, scale, dropout_p)
    return *grads, *(8 * [None])


attend.register_autograd(_differentiate, setup_context=_setup)
