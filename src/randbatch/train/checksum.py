"""Checksums of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["update_hash"]


def update_hash(found: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor's name, dtype, shape and numbers to an object of `hashlib`, without a copy of one on the CPU."""
    found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    if plain.numel():
        found.update(plain.view(torch.uint8).numpy())
