"""`torch.empty` and its like filled with NaN, integers with the largest number there is.

Only calls from Python that make numbers are touched: no compiler, no fake or meta tensor, no transform of `torch.func`
sees anything else than torch's own functions.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PLACES: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def _has_numbers(x: Tensor) -> bool:
    """Whether there is memory, and whoever asked for it is no tracer."""
    c: Any = torch._C
    if c._len_torch_dispatch_stack() > 0 or c._are_functorch_transforms_active():
        return False
    return type(x) is Tensor and x.layout == torch.strided and not x.is_meta and not x.is_quantized


def _fill(x: Tensor) -> None:
    with torch.no_grad():
        if x.is_floating_point() or x.is_complex():
            x.fill_(torch.nan)
        elif x.dtype != torch.bool:
            x.fill_(torch.iinfo(x.dtype).max)


def _filling(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        x = function(*args, **kwargs)
        if not torch.compiler.is_compiling() and _has_numbers(x):
            _fill(x)
        return x

    return make


@contextmanager
def filled() -> Iterator[None]:
    """Within it, what is not initialised is NaN."""
    # what `torch.device(...)` answers is looked up once: it must be torch's own functions
    importlib.import_module("torch.utils._device")._device_constructors()
    originals = [(owner, name, getattr(owner, name)) for owner, name in PLACES]
    for owner, name, function in originals:
        setattr(owner, name, _filling(function))
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
