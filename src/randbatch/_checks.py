"""Argument checks. Each raises an `InvalidValue` (a `ValueError`) or an `InvalidType` (a `TypeError`).

The message names the argument, what came and what is taken.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from randbatch._errors import InvalidType, InvalidValue
from randbatch._numerics import has_no_elements

MOST = 2**31 - 1
"""The largest count that a setting of a command may be; more is a slip of the hand."""
_SHOWN = 80  # characters of a value in a message


def check_integer(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """Return `value` as an int if it is one, or one of numpy's (not a bool), from `minimum` to `maximum`."""
    if not isinstance(value, int):
        if isinstance(value, Tensor) or not isinstance(value, SupportsIndex):
            raise InvalidType(f"{name} must be an int, got {type(value).__name__} ({_shown(value)})")
        value = operator.index(value)
    if isinstance(value, bool):
        raise InvalidType(f"{name} must be an int, got bool ({value})")
    if minimum is not None and value < minimum:
        raise InvalidValue(f"{name} must be at least {minimum}, got {_shown(value)}")
    if maximum is not None and value > maximum:
        raise InvalidValue(f"{name} must be at most {maximum}, got {_shown(value)}")
    return value


def check_seed(name: str, value: object, minimum: int = -(2**63)) -> int:
    """Return `value` if it is an int of 64 bits with a sign; to torch's generators −1 and 2⁶⁴ − 1 are one seed."""
    seed = check_integer(name, value)
    if not minimum <= seed < 2**63:
        raise InvalidValue(f"{name} must lie in {minimum} … {2**63 - 1}, got {_shown(value)}")
    return seed


def check_several(name: str, values: Sequence[object], minimum: int = 1) -> None:
    """Check that there are `minimum` values or more, and that none is there twice."""
    if len(values) < minimum:
        least = "one" if minimum == 1 else str(minimum)
        raise InvalidValue(f"{name} must name at least {least}, got {len(values) or 'none'}")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise InvalidValue(f"{name} must name each once, got {_shown(value)} twice")


def check_chunk_batches(value: object) -> None:
    """Check batches at a time: an int >= 1, `"auto"` or None."""
    if value is None or value == "auto":
        return
    if isinstance(value, str):
        raise InvalidValue(f"chunk_batches must be an int, 'auto' or None, got {_shown(value)}")
    check_integer("chunk_batches", value, 1)


def check_probability(name: str, value: object) -> float:
    """Return `value` if it lies in [0, 1)."""
    number = _number(name, value)
    if not 0.0 <= number < 1.0:
        raise InvalidValue(f"{name} must lie in [0, 1), got {_shown(value)}")
    return number


def check_positive(name: str, value: object) -> float:
    """Return `value` if it is a finite number > 0."""
    number = _number(name, value)
    if not 0.0 < number < math.inf:
        raise InvalidValue(f"{name} must be a finite number > 0, got {_shown(value)}")
    return number


def check_not_negative(name: str, value: object) -> float:
    """Return `value` if it is a finite number >= 0."""
    number = _number(name, value)
    if not 0.0 <= number < math.inf:
        raise InvalidValue(f"{name} must be a finite number >= 0, got {_shown(value)}")
    return number


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidType(f"{name} must be a number, got {type(value).__name__} ({value!r})")
    return value


def check_multiple(name: str, value: float, step_name: str, step: float) -> int:
    """How many steps make `value`, both > 0: a whole number, but for rounding."""
    ratio = value / step
    if ratio > MOST:
        raise InvalidValue(f"{name} must be at most {MOST} times {step_name} = {step}, got {value}")
    count = round(ratio)
    if not math.isclose(count * step, value, rel_tol=1e-9):
        raise InvalidValue(f"{name} must be a whole multiple of {step_name} = {step}, got {value}")
    return count


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; otherwise name the choices and the nearest one."""
    choices = list(choices)
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InvalidValue(f"{name} must be one of {', '.join(map(repr, choices))}; got {_shown(value)}.{hint}")


def _shown(value: object) -> str:
    """The value, not more of it than a line holds."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_batch_vector(batch: Tensor | None, num_tokens: int, device: torch.device) -> None:
    """Check PyG's `batch` vector: the graph of each token, integers `[N]` that are not negative."""
    if batch is None:
        return
    if batch.dtype not in (torch.int64, torch.int32):
        raise InvalidType(f"batch must be an int64 or int32 tensor, got {batch.dtype}")
    if batch.shape != (num_tokens,):
        raise InvalidValue(f"batch must have shape [{num_tokens}], one graph number per token, got {list(batch.shape)}")
    if batch.device != device:
        raise InvalidValue(f"batch is on {batch.device}, the tokens are on {device}; both must be on one device")
    if torch.compiler.is_compiling() or has_no_elements(batch):
        return  # what follows looks at numbers
    if num_tokens and int(batch.min()) < 0:
        raise InvalidValue(f"batch must hold graph numbers >= 0, got {int(batch.min())}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that query and key are `[N, H, D]` and value `[N, H, Dv]`, of one floating dtype, on one device."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise InvalidValue(f"{name} must have shape [N, H, D] (tokens, heads, head size), got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise InvalidType(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise InvalidType(f"{name} has dtype {tensor.dtype} but query has {query.dtype}; they must be the same")
        if tensor.device != query.device:
            raise InvalidValue(
                f"{name} is on {tensor.device} but query is on {query.device}; they must be on one device"
            )
        if tensor.shape[:2] != query.shape[:2]:
            raise InvalidValue(
                f"{name} has {tensor.shape[0]} tokens and {tensor.shape[1]} heads but query has {query.shape[0]} and "
                f"{query.shape[1]}; self-attention needs the same N and H"
            )
    if key.shape[2] != query.shape[2]:
        raise InvalidValue(f"key has head size {key.shape[2]} but query has {query.shape[2]}; they must be the same")
