"""Modules that call `F.scaled_dot_product_attention`: only that one step is replaced."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from randbatch._shapes import Bool
from randbatch.integrations.rules import RandomBatches
from randbatch.nn._sets import kept_where_zero

__all__ = ["key_mask", "through_sdpa"]


def through_sdpa(module: nn.Module, batches: RandomBatches, *args: Any, **kwargs: Any) -> Any:
    """An adapter for any module whose forward calls `F.scaled_dot_product_attention` on `[B, H, N, D]`.

    The module's own forward runs; projections, norms, rotary positions and gates stay as they are. Only that one call
    is answered by random batches. Masks of keys are respected; causal attention, cross-attention and masks between
    tokens are refused.

    Raises:
        RuntimeError: the forward never called it.
        ValueError: it was called for something that has no meaning inside random batches.

    Example:
        >>> import randbatch as rb
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, x):
        ...         return F.scaled_dot_product_attention(x, x, x)
        >>> _ = rb.convert.register(Attention)(rb.convert.through_sdpa)
        >>> report = rb.convert(model := Attention(), batch_size=64)
        >>> model(torch.randn(1, 4, 1000, 16)).shape
        torch.Size([1, 4, 1000, 16])
    """
    calls: list[int] = []  # beside the mode: `torch.compile` does not see a mode's attributes
    with _InsteadOfSDPA(batches, calls):
        out = batches.forward(*args, **kwargs)
    if not calls:
        raise RuntimeError(
            f"{type(module).__name__} never called F.scaled_dot_product_attention, so nothing would be done in random "
            "batches; register an adapter that says where its attention is"
        )
    return out


class _InsteadOfSDPA(TorchFunctionMode):
    """While it is active, `F.scaled_dot_product_attention` attends in random batches."""

    def __init__(self, batches: RandomBatches, calls: list[int]) -> None:
        super().__init__()
        self._calls = calls
        self._batches = batches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._calls.append(1)
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal:
            raise ValueError("is_causal must be False: a random batch has no order")
        if query.dim() != 4 or key.shape[2] != query.shape[2]:
            raise ValueError(
                f"query {list(query.shape)} and key {list(key.shape)} must both be [B, H, N, D] with the same N: "
                "random batches are for self-attention"
            )
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        mask = key_mask(attn_mask, query.shape[0], query.shape[2])
        turned = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        return self._batches.attend(*turned, mask=mask, scale=scale, dropout_p=dropout_p).transpose(1, 2)


def key_mask(
    mask: Tensor | None, num_sets: int, num_tokens: int, name: str = "attn_mask"
) -> Bool[Tensor, "b n"] | None:
    """SDPA's mask as bool `[B, N]`, True = token, if it says the same to every query and head.

    Raises:
        TypeError: the mask is neither bool nor floating point.
        ValueError: it is a mask or a bias between tokens, which random batches do not take.
    """
    if mask is None:
        return None
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if shape[1:] != (1, 1, num_tokens) or shape[0] not in (1, num_sets):
        raise ValueError(
            f"{name} must be the same for every query and head, [B, 1, 1, N], got {list(mask.shape)}: random batches "
            "take no mask and no bias between tokens"
        )
    kept = mask if mask.dtype == torch.bool else kept_where_zero(mask, name)
    return kept.reshape(shape[0], num_tokens).expand(num_sets, -1)
