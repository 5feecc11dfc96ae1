"""`RandomBatch`: any module over sets, inside random batches."""

from __future__ import annotations

import torch
from torch import Tensor

from randbatch._checks import check_batch_vector, check_integer
from randbatch._shapes import Bool, Float, Int
from randbatch.nn._sets import PaddedSets
from randbatch.partition import draw_seed, random_partition

__all__ = ["RandomBatch"]


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
        batch_size: p >= 2, tokens in a random batch.
        seed: the partition of eval. Give each layer of a stack its own. Default: 0.

    Raises:
        TypeError: `module` is not a module or `batch_size` not an int.
        ValueError: `batch_size` < 2.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> RandomBatch(layer, batch_size=64)(torch.randn(1000, 32)).shape
        torch.Size([1000, 32])
    """

    def __init__(self, module: torch.nn.Module, batch_size: int, *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(module, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        self.batch_size = check_integer("batch_size", batch_size, 2)
        self.seed = check_integer("seed", seed)

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
        if x.dim() == 2:
            if mask is not None:
                raise ValueError("mask is for padded sets [B, N, C]; flat tokens [N, C] take batch")
            return self._apply_in_batches(x, batch)
        if x.dim() != 3:
            raise ValueError(f"x must be [N, C] or [B, N, C], got {list(x.shape)}")
        if batch is not None:
            raise ValueError("batch is for flat tokens [N, C]; padded sets [B, N, C] take mask")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        sets = PaddedSets.of(x, mask, "mask")
        return sets.restore(self._apply_in_batches(sets.flatten(x), sets.batch))

    def _apply_in_batches(self, x: Tensor, batch: Tensor | None) -> Tensor:
        check_batch_vector(batch, x.shape[0], x.device)
        seed = draw_seed() if self.training else self.seed
        part = random_partition(x.shape[0], self.batch_size, batch=batch, seed=seed, device=x.device)
        blocks = part.split(part.pack(x)) or [x.unsqueeze(0)]  # no token: the module still decides the output's width
        outs = [self.module(block) for block in blocks]
        for block, out in zip(blocks, outs, strict=True):
            if out.shape[:2] != block.shape[:2]:
                raise ValueError(f"module must map {list(block.shape)} to [B, N, C'], it returned {list(out.shape)}")
        return part.unpack(part.join(outs))

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"batch_size={self.batch_size}, seed={self.seed}"
