"""A rule for timm's attentions, by name: timm need not be imported, and the forward stays as its version has it."""

from __future__ import annotations

from typing import Any

from torch import nn

from randbatch.conversion.adapters import AdapterRule, RandomBatches
from randbatch.conversion.rules import Ancestors
from randbatch.conversion.through_sdpa import through_sdpa

__all__ = ["RULES"]

_NAMES = {
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.diff_attention.DiffAttention",
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.vision_transformer.Attention",  # until timm 1.0.20
}


class _Attention(AdapterRule):
    name = "timm attention"
    changes = "a token, the class token too, attends to its random batch; all else is timm's own forward"

    def serves(self, cls: type[nn.Module]) -> bool:
        return f"{cls.__module__}.{cls.__qualname__}" in _NAMES

    def why_not(self, module: nn.Module, ancestors: Ancestors) -> str | None:
        if getattr(module, "relative_position_bias_table", None) is not None:
            return "it adds a relative position bias between tokens"
        return None

    def adapter(self, module: Any, batches: RandomBatches, /, *args: Any, **kwargs: Any) -> Any:
        fused = module.fused_attn
        module.fused_attn = True  # otherwise the same formula is written out, with N² weights
        try:
            return through_sdpa(module, batches, *args, **kwargs)
        finally:
            module.fused_attn = fused


RULES = (_Attention(),)
