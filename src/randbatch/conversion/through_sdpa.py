"""Modules that call `F.scaled_dot_product_attention`: only that one step is replaced."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from randbatch._errors import InvalidValue
from randbatch._numerics import has_no_elements
from randbatch._shapes import Bool, Shaped
from randbatch.conversion.adapters import RandomBatches
from randbatch.execution.padding import kept_where_zero

__all__ = ["key_mask", "through_sdpa"]


_NEVER = -1e4  # what older models add to the logits of padding: its exponential is 0 in every dtype


def through_sdpa(module: nn.Module, batches: RandomBatches, /, *args: Any, **kwargs: Any) -> Any:
    """An adapter for any module whose forward calls `F.scaled_dot_product_attention` on `[B, H, N, D]`.

    The module's own forward runs; projections, norms, rotary positions and gates stay as they are. Only that one call
    is answered by random batches. Masks of keys are respected; causal attention and masks between tokens are refused.

    It is for self-attention: row i of query and key is one token. Equal lengths do not prove it, and nothing else can
    be seen in the call; what shows otherwise is refused: other lengths, and a `context`, `memory`, `key` or the like
    in the arguments of the forward that is not its first argument. Register an adapter for nothing else.

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
    batches.refuse_other_tokens(args, kwargs)
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
            raise InvalidValue("is_causal must be False: a random batch has no order")
        if query.dim() != 4 or key.dim() != 4 or key.shape[2] != query.shape[2] or key.shape[0] != query.shape[0]:
            raise InvalidValue(
                f"query {list(query.shape)} and key {list(key.shape)} must both be [B, H, N, D] with the same B and N: "
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
    full = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask
    row = full[:, :1, :1]
    fits = full.dim() == 4 and full.shape[3] == num_tokens and full.shape[0] in (1, num_sets)
    if not fits or full.shape[2] not in (1, num_tokens) or not _is_expanded(full, row):
        raise InvalidValue(
            f"{name} must be the same for every query and head, [B, 1, 1, N], got {list(mask.shape)}: random batches "
            "take no mask and no bias between tokens"
        )
    if row.is_floating_point():
        row = row.masked_fill(row <= _NEVER, -torch.inf)
    kept = row if row.dtype == torch.bool else kept_where_zero(row, name)
    return kept.reshape(full.shape[0], num_tokens).expand(num_sets, -1)


def _is_expanded(full: Shaped[Tensor, "b h q n"], row: Shaped[Tensor, "b 1 1 n"]) -> bool:
    """Whether a mask is one row for all queries and heads: by its strides, or else by its numbers."""
    if all(full.shape[dim] == 1 or full.stride(dim) == 0 for dim in (1, 2)):
        return True
    if torch.compiler.is_compiling() or has_no_elements(full):
        return False  # no numbers to compare
    return bool((full == row).all())
