"""Dtypes and scales that attention is computed in, and whether there are elements to compute with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from randbatch._autograd import is_traced
from randbatch._errors import InvalidType

__all__ = ["as_autocast", "check_tensor", "has_no_elements", "logit_scale", "wide_dtype"]


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the arguments of `scaled_dot_product_attention`, outside of autocast not at all.

    All floating dtypes but float64 become the autocast dtype, whichever backend computes.
    """
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def has_no_elements(x: Tensor) -> bool:
    """Whether `x` is a meta tensor, or a fake one outside of `torch.compile`: it has a shape, and no numbers."""
    if torch.compiler.is_compiling():
        return False
    return x.is_meta or (type(x) is not Tensor and type(x).__name__ == "FakeTensor")


def check_tensor(name: str, x: object) -> None:
    """Check that `x` is a tensor, and that nothing traces what cannot be traced.

    Raises:
        TypeError: it is not; `torch.fx.symbolic_trace` passes stand-ins.
        NotImplementedError: inside `torch.jit.trace`.
    """
    if not isinstance(x, Tensor):
        advice = "; torch.fx cannot trace random batches, use torch.export" if type(x).__name__ == "Proxy" else ""
        raise InvalidType(f"{name} must be a tensor, got {type(x).__name__}{advice}")
    if is_traced():
        raise NotImplementedError(
            "torch.jit.trace would keep one partition for ever; use torch.compile or torch.export"
        )


def logit_scale(scale: float | None, head_size: int) -> float:
    """The factor of the logits; 1/√D where none is given."""
    return 1 / math.sqrt(head_size) if scale is None else scale


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to accumulate in: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)
