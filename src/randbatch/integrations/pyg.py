"""Rules for torch_geometric: `GPSConv` and the linear attentions, also inside `SGFormer`, `Polynormer` and `QFormer`.

Imported only when torch_geometric is loaded already. `QFormer` is a torch encoder and needs no rule of its own.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from randbatch._optional import require
from randbatch.integrations.rules import RandomBatches, Rule, Undo, add_adapter_rule, add_rule, swap_class
from randbatch.nn.sampling import Sampling

__all__: list[str] = []

_attention = require("torch_geometric.nn.attention")
_GPSConv: type[nn.Module] = require("torch_geometric.nn").GPSConv


def _in_batches(
    module: nn.Module, batches: RandomBatches, x: Tensor, mask: Tensor | None = None, *, batch: Tensor | None = None
) -> Tensor:
    """The module's own forward on every random batch; no mask reaches it, since there is no padding."""
    return batches.apply(batches.forward, x, mask=mask, batch=batch)


def _gps_forward(self: Any, x: Tensor, edge_index: Any, batch: Tensor | None = None, **kwargs: Any) -> Tensor:
    """`GPSConv.forward` with the attention on flat tokens: graphs of unlike sizes are never padded."""

    def normalise(norm: Any, h: Tensor) -> Tensor:
        if norm is None:
            return h
        return norm(h, batch=batch) if self.norm_with_batch else norm(h)

    branches: list[Tensor] = []
    if self.conv is not None:
        h = self.conv(x, edge_index, **kwargs)
        branches.append(normalise(self.norm1, F.dropout(h, self.dropout, self.training) + x))
    h = self.attn(x, batch=batch)
    branches.append(normalise(self.norm2, F.dropout(h, self.dropout, self.training) + x))
    out = sum(branches[1:], branches[0])
    return normalise(self.norm3, out + self.mlp(out))


def _swap_gps(module: nn.Module, sampling: Sampling) -> Undo:
    return swap_class(module)


_SUMS = (
    "it stays a linear attention, but its sums run over a random batch, not over all tokens; no padding enters them; "
    "several rounds are averaged, and the estimator does not apply"
)
_SWITCH = "; a Polynormer attends only once its `_global` is True"
for _name, _more in (("PerformerAttention", ""), ("SGFormerAttention", ""), ("PolynormerAttention", _SWITCH)):
    add_adapter_rule(getattr(_attention, _name), f"pyg {_name}", _SUMS + _more, _in_batches)
add_rule(
    _GPSConv,
    Rule(
        "pyg GPSConv",
        "tokens stay flat: graphs are not padded to the largest",
        _swap_gps,
        around=lambda module: [module.attn] if isinstance(module.attn, nn.Module) else [],
        attributes=(),
    ),
    _gps_forward,
)
