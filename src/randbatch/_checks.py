"""Argument checks. Each raises a `ValueError` or `TypeError` that names the argument, what came and what is taken."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor


def check_integer(name: str, value: object, minimum: int | None = None) -> int:
    """Return `value` if it is an int (not a bool) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} ({value!r})")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_chunk_batches(value: object) -> None:
    """Check batches at a time: an int >= 1, `"auto"` or None."""
    if value is None or value == "auto":
        return
    if isinstance(value, str):
        raise ValueError(f"chunk_batches must be an int, 'auto' or None, got {value!r}")
    check_integer("chunk_batches", value, 1)


def check_probability(name: str, value: float) -> float:
    """Return `value` if it lies in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return value


def check_positive(name: str, value: object) -> float:
    """Return `value` if it is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} ({value!r})")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
    return value


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; otherwise name the choices and the nearest one."""
    choices = list(choices)
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.{hint}")


def check_batch_vector(batch: Tensor | None, num_tokens: int, device: torch.device) -> None:
    """Check PyG's `batch` vector: the graph of each token, integers `[N]` that are not negative."""
    if batch is None:
        return
    if batch.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"batch must be an int64 or int32 tensor, got {batch.dtype}")
    if batch.shape != (num_tokens,):
        raise ValueError(f"batch must have shape [{num_tokens}], one graph number per token, got {list(batch.shape)}")
    if batch.device != device:
        raise ValueError(f"batch is on {batch.device}, the tokens are on {device}; both must be on one device")
    if torch.compiler.is_compiling():
        return  # what follows looks at numbers, which a traced program cannot
    if num_tokens and int(batch.min()) < 0:
        raise ValueError(f"batch must hold graph numbers >= 0, got {int(batch.min())}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that query and key are `[N, H, D]` and value `[N, H, Dv]`, of one floating dtype, on one device."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape [N, H, D] (tokens, heads, head size), got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} but query has {query.dtype}; they must be the same")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}; they must be on one device")
        if tensor.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name} has {tensor.shape[0]} tokens and {tensor.shape[1]} heads but query has {query.shape[0]} and "
                f"{query.shape[1]}; self-attention needs the same N and H"
            )
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"key has head size {key.shape[2]} but query has {query.shape[2]}; they must be the same")
