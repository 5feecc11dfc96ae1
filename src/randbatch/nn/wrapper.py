"""`RandomBatch`: any module over sets, inside random batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from randbatch._checks import check_integer
from randbatch._errors import InvalidType
from randbatch._shapes import Bool, Float, Int
from randbatch.nn.batches import apply_in_batches
from randbatch.nn.config import RandomBatchConfig, own_config
from randbatch.nn.former import FormerName

__all__ = ["RandomBatch"]

_OPTIONS = ("rounds", "eval_rounds", "seed", "exact_eval", "chunk_batches")  # the others are for attention


class RandomBatch(torch.nn.Module):
    """Apply a module over sets, `f(x[B, N, C]) -> [B, N, C']`, inside random batches of p tokens.

    `y_C = f(x_C)` for every random batch C. The wrapped module and its weights are untouched. It always sees whole
    batches of equal size, `[M, P, C]`, never padding and never a mask: many published linear attentions let padding
    leak into their denominators. A set whose size p does not divide has batches of two sizes, hence two calls.

    In training every call draws a fresh partition from torch's default CPU generator; in eval the partition depends on
    `seed` alone. With `batch_size` >= N this is `module` itself.

    Args:
        module: any module that maps `[B, N, C]` to `[B, N, C']`, treats the B sets alike and does not depend on the
            order of the N.
        batch_size: p >= 2, tokens in a random batch; or a `RandomBatchConfig`.
        **options: `rounds`, `eval_rounds`, `seed`, `exact_eval` and `chunk_batches` of `RandomBatchConfig`. The outputs
            of several rounds are averaged: a module that returns no denominators leaves nothing else to merge.
            `chunk_batches` is an int: the module is called once for each chunk, so batch norms see chunks, and update
            twice. Default of `seed`: one of its own, see `RandomBatchAttention`.

    Raises:
        TypeError: `module` is not a module, or `batch_size` or `chunk_batches` not an int.
        ValueError: `batch_size` < 2 or `chunk_batches` < 1.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> RandomBatch(layer, batch_size=64)(torch.randn(1000, 32)).shape
        torch.Size([1000, 32])
    """

    sampling = FormerName()

    def __init__(
        self,
        module: torch.nn.Module,
        batch_size: int | RandomBatchConfig,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(module, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidType(f"module must be a torch.nn.Module, got {type(module).__name__}")
        unused = [name for name in options if name not in _OPTIONS]
        if unused:
            raise InvalidType(f"RandomBatch has no option {unused[0]!r}; its options are {', '.join(_OPTIONS)}")
        self.module = module
        config = own_config(batch_size, options)
        if config.chunk_batches is not None:
            check_integer("chunk_batches", config.chunk_batches, 1)
        self.randbatch_config = config

    def forward(
        self,
        x: Float[Tensor, "n c"] | Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        *,
        batch: Int[Tensor, " n"] | None = None,
    ) -> Tensor:
        """Apply the module inside random batches.

        Args:
            x: flat tokens `[N, C]`, or padded sets `[B, N, C]`.
            mask: bool `[B, N]`, True = token, for padded sets; other rows take no part and their output is zero.
            batch: integers `[N]`, the graph of each token, for flat tokens; graphs never mix.

        Returns:
            `[N, C']` or `[B, N, C']`.

        Raises:
            TypeError: `mask` is not bool or `batch` not an integer vector.
            ValueError: shapes that do not fit, or an output of the module that is not `[B, N, C']`.
        """
        return apply_in_batches(self.randbatch_config, self.training, self.module, x, mask, batch, owner=self)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return self.randbatch_config.describe()
