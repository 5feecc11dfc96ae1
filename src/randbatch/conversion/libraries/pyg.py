"""Rules for torch_geometric: `GPSConv` and the linear attentions, also inside `SGFormer`, `Polynormer` and `QFormer`.

Imported only when torch_geometric is loaded already. `QFormer` is a torch encoder and needs no rule of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from randbatch._optional import require
from randbatch.conversion.adapters import AdapterRule, RandomBatches

__all__ = ["RULES"]

_attention = require("torch_geometric.nn.attention")


class _LinearAttention(AdapterRule):
    """The module's own forward on every random batch; no mask reaches it, since there is no padding."""

    changes = (
        "it stays a linear attention, but its sums run over a random batch, not over all tokens; no padding enters "
        "them; several rounds are averaged, and the estimator does not apply"
    )

    def __init__(self, name: str, more: str = "") -> None:
        self.cls = getattr(_attention, name)
        self.name = f"pyg {name}"
        self.changes += more

    def adapter(
        self,
        module: nn.Module,
        batches: RandomBatches,
        /,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        batch: Tensor | None = None,
    ) -> Tensor:
        return batches.apply(batches.forward, x, mask=mask, batch=batch)


class _GPSConv(AdapterRule):
    """`GPSConv.forward` with the attention on flat tokens: graphs of unlike sizes are never padded."""

    name = "pyg GPSConv"
    changes = "tokens stay flat: graphs are not padded to the largest"
    cls = require("torch_geometric.nn").GPSConv
    sets = ()

    def depends_on(self, module: Any) -> Iterable[nn.Module]:
        return [module.attn] if isinstance(module.attn, nn.Module) else []

    def adapter(
        self,
        module: Any,
        batches: RandomBatches,
        /,
        x: Tensor,
        edge_index: Any,
        batch: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def normalise(norm: Any, h: Tensor) -> Tensor:
            if norm is None:
                return h
            return norm(h, batch=batch) if module.norm_with_batch else norm(h)

        branches: list[Tensor] = []
        if module.conv is not None:
            h = module.conv(x, edge_index, **kwargs)
            branches.append(normalise(module.norm1, F.dropout(h, module.dropout, module.training) + x))
        h = module.attn(x, batch=batch)
        branches.append(normalise(module.norm2, F.dropout(h, module.dropout, module.training) + x))
        out = sum(branches[1:], branches[0])
        return normalise(module.norm3, out + module.mlp(out))


RULES = (
    _LinearAttention("PerformerAttention"),
    _LinearAttention("SGFormerAttention"),
    _LinearAttention("PolynormerAttention", "; a Polynormer attends only once its `_global` is True"),
    _GPSConv(),
)
