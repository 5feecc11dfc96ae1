"""What a layer of random batch attention is compared with: forward functions from `[N, C]` to `[N, C]`.

Shape letters: N tokens, C channels, M batches, H heads, P tokens in a batch, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randbatch._optional import require
from randbatch._shapes import Float, Int
from randbatch.nn import RandomBatchAttention
from randbatch.partition import random_partition

__all__ = ["PEERS", "Peer", "naive"]


def naive(
    layer: RandomBatchAttention, x: Float[Tensor, "n c"], order: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "n c"]:
    """What one would write first, with the weights of `layer`; N must be a multiple of p.

    Projection, `index_select` of query, key and value, `scaled_dot_product_attention`, `index_copy`, projection.
    """
    num_tokens, channels = x.shape
    size, heads = layer.randbatch_config.batch_size, layer.num_heads
    order = random_partition(num_tokens, size, seed=1, device=x.device).order if order is None else order
    projected = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).unflatten(-1, (3, heads, -1)).unbind(1)
    q, k, v = (t.index_select(0, order).unflatten(0, (-1, size)).transpose(1, 2) for t in projected)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    out = torch.zeros_like(out).index_copy(0, order, out)
    return layer.out_proj(out.reshape(num_tokens, channels))


@dataclass(frozen=True)
class Peer:
    """A way to attend.

    Attributes:
        make: from C, H, p to the modules whose parameters it has, and the function.
        quadratic: whether it takes O(N²) time.
        same: whether it computes what the layer computes, given one batch of all tokens and the same weights.
    """

    make: Callable[[int, int, int], tuple[nn.Module, Callable[[Tensor], Tensor]]]
    quadratic: bool = False
    same: bool = False


def _layer(channels: int, heads: int, batch_size: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = RandomBatchAttention(channels, heads, batch_size)
    return layer, layer


def _pieces(channels: int, heads: int, batch_size: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = RandomBatchAttention(channels, heads, batch_size, chunk_batches="auto")
    return layer, layer


def _naive(channels: int, heads: int, batch_size: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = RandomBatchAttention(channels, heads, batch_size)
    return layer, lambda x: naive(layer, x)


def _full(channels: int, heads: int, batch_size: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def attend(x: Tensor) -> Tensor:
        one = x.unsqueeze(0)
        return attention(one, one, one, need_weights=False)[0].squeeze(0)

    return attention, attend


def _of_pyg(
    name: str, one_head: bool = False
) -> Callable[[int, int, int], tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    def make(channels: int, heads: int, batch_size: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        heads = 1 if one_head else heads
        attention = getattr(require("torch_geometric.nn.attention"), name)(
            channels, heads, head_channels=channels // heads
        )

        def attend(x: Tensor) -> Tensor:
            # the mask that Polynormer asks for has every token in it
            every = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
            return attention(x.unsqueeze(0), every).squeeze(0)

        return attention, attend

    return make


PEERS: dict[str, Peer] = {
    "layer": Peer(_layer, same=True),
    "pieces": Peer(_pieces, same=True),
    "naive": Peer(_naive, same=True),
    "full": Peer(_full, quadratic=True, same=True),
    "performer": Peer(_of_pyg("PerformerAttention")),
    "sgformer": Peer(_of_pyg("SGFormerAttention", one_head=True)),  # it gives the mean over the heads
    "polynormer": Peer(_of_pyg("PolynormerAttention")),
}
"""Name → peer: ours, ours with `chunk_batches="auto"`, the naive composition, `MultiheadAttention`, PyG's three."""
